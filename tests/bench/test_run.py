"""That the measurements run and say what they should; never how fast."""

import json

import pytest

from bench import run


def test_rows_have_a_ratio_and_a_distance_to_the_floor(tmp_path):
    assert run.main(["load", "adaptive_conv/forward", "--quick", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["adaptive_conv/forward", "load"]
    for row in rows:
        assert row["ratio"] == row["baseline"] / row["ours"] > 0
        assert row["of_floor"] == row["floor"] / row["ours"] > 0


def test_rows_are_listed_and_unknown_ones_refused(capsys):
    assert run.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == list(run.QUESTIONS)
    with pytest.raises(SystemExit) as exit_:
        run.main(["nothing"])
    assert exit_.value.code == 2
