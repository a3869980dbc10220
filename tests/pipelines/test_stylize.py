from pipelines import stylize


def test_a_scratch_folder_is_where_the_command_is_given(tmp_path, monkeypatch):
    """Actors have other working directories."""
    given = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("adaconv.stylize.replay.replay", lambda output, **how: given.update(how) or {})
    assert stylize.main(["--replay", "out.png", "--content", "contents", "--tile.scratch", "maps"]) == 0
    assert given["scratch"] == str(tmp_path / "maps")
