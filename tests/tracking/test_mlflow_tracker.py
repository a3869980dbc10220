"""One training is one MLflow run, on a real database and a real server."""

import contextlib
import math
import os
import pickle
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from adaconv.errors import TrackingError
from adaconv.tracking.mlflow_tracker import close_run, default_uri, open_run


def start(uri: str, folder: Path, name: str = "run-1"):
    return open_run(
        uri=uri,
        experiment="test",
        name=name,
        params={"train": {"steps": 4, "long": "x" * 7000}, "model": {"name": "tiny"}},
        tags={"git.commit": "abc"},
        datasets={"content": ("/data/photos@v1", "f" * 64)},
        config_yaml="train: {steps: 4}\n",
        spool_directory=folder / "run-1" / "spool",
    )


@pytest.fixture
def database(tmp_path):
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def points(uri, run_id, key):
    return [(p.step, p.value) for p in MlflowClient(uri).get_metric_history(run_id, key)]


def test_a_run_keeps_what_training_tells_and_ends_with_its_status(tmp_path, database):
    tracker = start(database, tmp_path)
    for step in (1, 2, 3):
        tracker.metrics({"train/loss": 1 / step, "train/odd": math.nan}, step=step)
    tracker.image("samples/grid", np.zeros((8, 8, 3), np.uint8), step=2)
    tracker.checkpoint("/runs/step-00000003", step=3)
    close_run(tracker, "FINISHED")

    run = MlflowClient(database).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert points(database, tracker.run_id, "train/loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert len(points(database, tracker.run_id, "train/odd")) == 3
    assert run.data.params["train.steps"] == "4"
    assert len(run.data.params["train.long"]) == 6000
    assert run.data.tags["adaconv.checkpoint"] == "/runs/step-00000003"
    assert run.inputs.dataset_inputs[0].dataset.digest == "f" * 36
    artifacts = MlflowClient(database).list_artifacts(tracker.run_id, "images")
    assert sum(a.path.endswith(".png") for a in artifacts) == 1
    assert Path(run.info.artifact_uri.removeprefix("file://")).is_relative_to(tmp_path)


def test_a_run_taken_up_again_is_the_same_run_with_each_step_once(tmp_path, database):
    """Killed after step 3, resumed from a checkpoint of step 1: steps 2 and 3 are told again and change nothing."""
    first = start(database, tmp_path)
    for step in (1, 2, 3):
        first.metrics({"train/loss": float(step)}, step=step)
    first.image("samples/grid", np.zeros((8, 8, 3), np.uint8), step=2)
    first.flush(timeout_seconds=20)
    first.close()  # as a kill leaves it: RUNNING

    second = start(database, tmp_path)
    for step in (2, 3, 4):
        second.metrics({"train/loss": float(step)}, step=step)
    second.image("samples/grid", np.zeros((8, 8, 3), np.uint8), step=2)
    second.image("samples/grid", np.zeros((8, 8, 3), np.uint8), step=4)
    close_run(second, "FINISHED")

    assert second.run_id == first.run_id
    assert points(database, first.run_id, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    images = MlflowClient(database).list_artifacts(first.run_id, "images")
    assert sum(a.path.endswith(".png") for a in images) == 2


def test_a_failed_run_says_so_and_why(tmp_path, database):
    tracker = start(database, tmp_path)
    close_run(tracker, "FAILED", error="NonFiniteError: step 7")
    run = MlflowClient(database).get_run(tracker.run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["adaconv.error"] == "NonFiniteError: step 7"


def test_a_tracker_travels_to_another_process_before_and_after_use(tmp_path, database):
    tracker = start(database, tmp_path)
    tracker.metrics({"train/loss": 1.0}, step=1)
    tracker.flush(timeout_seconds=20)
    copy = pickle.loads(pickle.dumps(tracker))
    tracker.close()
    copy.metrics({"train/loss": 2.0}, step=2)
    close_run(copy, "FINISHED")
    assert points(database, tracker.run_id, "train/loss") == [(1, 1.0), (2, 2.0)]


def test_where_runs_go_is_said_or_found(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert default_uri(None, tmp_path) == "http://127.0.0.1:5000"
    assert default_uri("sqlite:////x.db", tmp_path) == "sqlite:////x.db"
    with pytest.raises(TrackingError, match="no longer keeps runs in folders"):
        default_uri("./mlruns", tmp_path)


def test_a_server_that_is_not_there_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with pytest.raises(TrackingError, match=r"cannot open a run at http://127\.0\.0\.1:9"):
        start("http://127.0.0.1:9", tmp_path)


@pytest.fixture
def server(tmp_path):
    """A real MLflow server on loopback that can be stopped and started: (uri, start, stop)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri, processes = f"http://127.0.0.1:{port}", []

    def up() -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
                   "--backend-store-uri", f"sqlite:///{tmp_path}/server.db",
                   "--artifacts-destination", str(tmp_path / "artifacts"), "--workers", "1"]  # fmt: skip
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (tmp_path / "server.log").open("ab") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{uri}/health", timeout=1):
                return
            time.sleep(0.3)
        raise AssertionError((tmp_path / "server.log").read_text())

    def down() -> None:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
        processes.clear()

    up()
    yield uri, up, down
    down()


@pytest.mark.slow
def test_a_server_that_dies_in_the_middle_loses_nothing(tmp_path, server, monkeypatch):
    """Metrics told while the server is down arrive when it is back, each once."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    uri, up, down = server
    tracker = start(uri, tmp_path)
    tracker.metrics({"train/loss": 1.0}, step=1)
    assert tracker.flush(timeout_seconds=30) == 0
    down()
    began = time.monotonic()
    for step in range(2, 200):
        tracker.metrics({"train/loss": float(step)}, step=step)
    assert time.monotonic() - began < 5
    assert tracker.flush(timeout_seconds=1) > 0
    up()
    assert tracker.flush(timeout_seconds=90) == 0
    close_run(tracker, "FINISHED")
    assert points(uri, tracker.run_id, "train/loss") == [(step, float(step)) for step in range(1, 200)]
    assert MlflowClient(uri).get_run(tracker.run_id).info.status == "FINISHED"
