"""What is done with runs that have ended: each for itself, and in the database that was meant."""

import json

import pytest
from mlflow import MlflowClient

from adaconv.tracking import spool as spool_module
from adaconv.tracking.mlflow_tracker import close_run, open_run
from pipelines import register, runs


def start(uri, folder, name):
    return open_run(
        uri=uri,
        experiment="test",
        identity=name,
        name=name,
        params={},
        tags={},
        datasets={},
        config_yaml="",
        spool_directory=folder / name / "spool",
    )


def test_sync_hands_over_what_it_can_and_lists_the_rest(tmp_path, monkeypatch, capsys):
    """Two runs are deleted, one with a record that waits; one is going on; one is as it should be."""
    monkeypatch.setattr(spool_module, "_OWNER_GOES_SECONDS", 0.2)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    names = ("a-deleted", "b-deleted", "c-going-on", "d-waiting")
    deleted, deleted_later, going_on, waiting = trackers = [start(uri, tmp_path, name) for name in names]
    line = {"kind": "metrics", "step": 1, "timestamp_ms": 1, "values": {"train/loss": 1.0}}
    for tracker in trackers:
        tracker.release()
        if tracker in (deleted_later, waiting):
            with (tracker.spool / "records.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
    client = MlflowClient(uri)
    client.delete_run(deleted.run_id)
    client.delete_run(deleted_later.run_id)
    going_on.metrics({"train/loss": 1.0}, step=1)
    assert runs.main(["sync", "--runs", str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert f"has no run 'a-deleted' of {deleted.spool}" in told
    assert "run 'b-deleted'" in told
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["runs"] == {"d-waiting": waiting.run_id}
    assert result["going_on"] == [str(going_on.spool)]
    assert [point.step for point in client.get_metric_history(waiting.run_id, "train/loss")] == [1]
    close_run(going_on, "FINISHED")


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (runs.main, ("page", "--run", "r", "--output", "pages")),
        (runs.main, ("reap",)),
        (register.main, ("--rollback", "champion")),
        (register.main, ("--model", "models:/adaconv@candidate")),
    ],
    ids=lambda value: "-".join(value[:1]) if isinstance(value, tuple) else "",
)
def test_nothing_is_looked_for_in_a_database_that_is_not_there(tmp_path, monkeypatch, capsys, main, argv):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(argv) == 1
    assert f"expected MLflow's database at {tmp_path}/mlflow.db, found none; give --tracking" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv", [("page", "--run", "r", "--output", "pages"), ("reap",)], ids=lambda argv: argv[0])
def test_a_server_that_is_away_is_one_clear_line(monkeypatch, capsys, argv):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert runs.main((*argv, "--tracking-uri", "http://127.0.0.1:9")) == 1
    assert "error: tracking: http://127.0.0.1:9 does not answer: " in capsys.readouterr().err
