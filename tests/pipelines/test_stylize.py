"""pipelines/stylize.py: what needs no cluster."""

import pytest

from pipelines import stylize
from tests.helpers import save_checkpoint


def test_a_scratch_folder_is_where_the_command_is_given(tmp_path, monkeypatch):
    """Actors have other working directories."""
    given = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("adaconv.stylize.replay.replay", lambda output, **how: given.update(how) or {})
    assert stylize.main(["--replay", "out.png", "--content", "contents", "--tile.scratch", "maps"]) == 0
    assert given["scratch"] == str(tmp_path / "maps")


@pytest.mark.parametrize("below", ["runs/one/checkpoints/step-00000009", "runs/one", "runs"])
def test_a_dry_run_names_the_checkpoint_that_is_meant(tmp_path, photos, paintings, capsys, below):
    for step in (7, 9):
        save_checkpoint(tmp_path / "runs" / "one" / "checkpoints", step)
    told = ("--content", str(photos), "--style", str(paintings), "--output", str(tmp_path / "out"), "--dry-run")
    assert stylize.main(["--model", str(tmp_path / below), *told]) == 0
    assert f"432 outputs of {tmp_path}/runs/one/checkpoints/step-00000009 in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nowhere", "expected a checkpoint, a run or a folder of runs at nowhere"),
        ("models:/adaconv@champion", "expected MLflow's database at"),
        ("models:/adaconv", "expected models:/adaconv@ALIAS or models:/adaconv/VERSION"),
    ],
)
def test_a_dry_run_misses_a_model_that_is_not_there(tmp_path, photos, paintings, capsys, monkeypatch, model, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    told = ("--content", str(photos), "--style", str(paintings), "--output", "out", "--dry-run")
    assert stylize.main(["--model", model, *told]) != 0
    assert words in capsys.readouterr().err
