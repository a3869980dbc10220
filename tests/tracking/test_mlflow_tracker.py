"""One training is one MLflow run, on a real database and a real server."""

import contextlib
import itertools
import json
import math
import pickle
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from mlflow import MlflowClient

from adaconv.errors import Interrupted, TrackingError
from adaconv.progress import repeatedly
from adaconv.tracking import mlflow_tracker, runs
from adaconv.tracking import spool as spool_module
from adaconv.tracking.mlflow_tracker import close_run, logged_checkpoints, open_run, sync
from adaconv.tracking.results import find
from adaconv.tracking.runs import (
    client_of,
    default_uri,
    find_run,
    identity_of,
    make_or_find,
    ping,
    process_here,
    reap,
)
from tests.servers import MlflowServer, free_port

SLOW = pytest.mark.slow


def start(uri: str, folder: Path, name: str = "run-1", identity: str | None = None, **train):
    return open_run(
        uri=uri,
        experiment="test",
        identity=identity or name,
        name=name,
        params={"train": {"steps": 4, "long": "x" * 7000, **train}, "model": {"name": "tiny", "groups": [1, 2]}},
        tags={"adaconv.content_hash": "f" * 64},
        datasets={"content": ("/data/photos@v1", "f" * 64)},
        config_yaml="train: {steps: 4}\n",
        spool_directory=folder / name / "spool",
    )


@pytest.fixture(autouse=True)
def nobody_goes_on_telling():
    """What a test leaves open would call at its server beside later tests of this process, whose MLflow is one."""
    yield
    ends = {"tracking-heartbeat": "release", "system-metrics": "stop", "tracking-spool": "close"}
    for thread in threading.enumerate():
        if thread.name in ends:
            with contextlib.suppress(AttributeError):  # it has just ended
                getattr(thread._target.__self__, ends[thread.name])()


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
    tracker.checkpoint("/runs/step-00000001", step=1)
    tracker.checkpoint("/runs/step-00000003", step=3)
    assert close_run(tracker, "FINISHED")

    run = MlflowClient(database).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert points(database, tracker.run_id, "train/loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert len(points(database, tracker.run_id, "train/odd")) == 3
    assert run.data.params["train.steps"] == "4"
    assert run.data.params["model.groups"] == "[1, 2]"
    assert len(run.data.params["train.long"]) == 6000
    assert run.data.params["train.long"].endswith("…")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert run.data.tags["git.commit"] == run.data.tags["mlflow.source.git.commit"] == commit
    assert run.data.tags["git.dirty"] in ("True", "False")
    client = MlflowClient(database)
    assert Path(client.download_artifacts(tracker.run_id, "config.yaml")).read_text() == "train: {steps: 4}\n"
    assert "torch==" in Path(client.download_artifacts(tracker.run_id, "environment.txt")).read_text()
    assert [one["step"] for one in logged_checkpoints(client, tracker.run_id)] == [1, 3]
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
    first.release()

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


def test_the_same_settings_in_another_folder_are_another_run(tmp_path, database):
    """Same name, same server: neither loses a point to the other."""
    folders = [tmp_path / who / "adaconv-0123" for who in ("ann", "bob")]
    identities = [identity_of(str(folder)) for folder in folders]
    assert identities == [identity_of(str(folder)) for folder in folders]
    trackers = [start(database, folder, identity=one) for folder, one in zip(folders, identities, strict=True)]
    for number, tracker in enumerate(trackers):
        tracker.metrics({"train/loss": float(number)}, step=1)
        assert tracker.flush(timeout_seconds=20) == 0
    for number, tracker in enumerate(trackers):
        assert points(database, tracker.run_id, "train/loss") == [(1, float(number))]
        close_run(tracker, "FINISHED")


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
    assert default_uri("sqlite:///x.db", tmp_path) == f"sqlite:///{Path.cwd()}/x.db"
    with pytest.raises(TrackingError, match="no longer keeps runs in folders"):
        default_uri("./mlruns", tmp_path)
    with pytest.raises(TrackingError, match="in MLFLOW_TRACKING_USERNAME"):
        default_uri("https://ann:secret@example.org/mlflow", tmp_path)
    assert default_uri("https://example.org/a:b@c", tmp_path) == "https://example.org/a:b@c"


def test_what_a_later_start_changes_is_told_as_tags(tmp_path, database):
    close_run(start(database, tmp_path, workers=2), "KILLED")
    close_run(start(database, tmp_path, workers=4), "FAILED", error="lost")
    last = start(database, tmp_path, workers=8)
    close_run(last, "FINISHED")
    run = MlflowClient(database).get_run(last.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.workers"] == "2"
    told = run.data.tags["changed.train.workers"]
    assert told.startswith("2 -> 4 at 20")
    assert "; -> 8 at 20" in told
    assert [name for name in run.data.tags if name.startswith("changed.")] == ["changed.train.workers"]
    assert "adaconv.error" not in run.data.tags  # of the start that failed


def test_steps_older_than_the_newest_fill_the_gaps_only(tmp_path, database):
    """Another machine's spool comes late: what nobody told yet is logged, what is there is not."""
    tracker = start(database, tmp_path)
    for step in (10, 11, 12):
        tracker.metrics({"train/loss": float(step)}, step=step)
    tracker.flush(timeout_seconds=20)
    tracker.close()
    late = start(database, tmp_path / "elsewhere")
    for step in (8, 9, 10, 11):
        late.metrics({"train/loss": -1.0, "train/other": 1.0}, step=step)
    close_run(late, "FINISHED")
    assert sorted(points(database, late.run_id, "train/loss")) == [(8, -1), (9, -1), (10, 10), (11, 11), (12, 12)]
    assert [step for step, _ in points(database, late.run_id, "train/other")] == [8, 9, 10, 11]


def test_an_answer_that_was_lost_is_no_second_point(tmp_path, database, monkeypatch):
    """The server took metrics, a picture and a run, and the client never heard so."""
    tracker = start(database, tmp_path)
    lost = {"create_run", "log_batch", "log_artifact", "set_tag"}

    def losing(name):
        method = getattr(MlflowClient, name)

        def call(self, *arguments, **more):
            answer = method(self, *arguments, **more)
            if name in lost:
                lost.remove(name)
                raise ConnectionError("no answer")
            return answer

        return call

    for name in tuple(lost):
        monkeypatch.setattr(MlflowClient, name, losing(name))
    fresh = start(database, tmp_path, name="run-2")
    for step in range(5):
        fresh.metrics({"train/loss": float(step)}, step=step)
    fresh.image("samples/grid", np.zeros((8, 8, 3), np.uint8), step=2)
    assert fresh.flush(timeout_seconds=30) == 0
    close_run(fresh, "FINISHED")
    close_run(tracker, "FINISHED")
    assert not lost
    client = MlflowClient(database)
    assert points(database, fresh.run_id, "train/loss") == [(step, float(step)) for step in range(5)]
    assert len(client.list_artifacts(fresh.run_id, "images")) == 2  # the picture, and its small copy
    runs = client.search_runs([client.get_run(fresh.run_id).info.experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["run-1", "run-2"]


def test_two_that_make_a_run_at_once_keep_the_same_one(tmp_path, database):
    tracker = start(database, tmp_path)
    client = client_of(database)
    mine = client.get_run(tracker.run_id)
    client.create_run(mine.info.experiment_id, tags={"adaconv.id": "run-1"})  # a ghost, as a retried request leaves it
    client.delete_run(tracker.run_id)
    again = make_or_find(client, tracker.description)
    assert again.info.run_id != tracker.run_id
    client.restore_run(tracker.run_id)
    assert make_or_find(client, tracker.description).info.run_id == tracker.run_id


def test_a_ghost_that_comes_late_is_not_taken_for_the_run(tmp_path, database):
    """A creation that was made again has the run's time, and an id that may sort before it."""
    tracker = start(database, tmp_path)
    close_run(tracker, "FINISHED")
    client = client_of(database)
    mine = client.get_run(tracker.run_id)
    ghosts = [
        client.create_run(mine.info.experiment_id, start_time=mine.info.start_time - 1, tags={"adaconv.id": "run-1"})
        for _ in range(2)
    ]
    assert find_run(client, "test", "run-1") == tracker.run_id
    assert make_or_find(client, tracker.description).info.run_id == tracker.run_id
    assert {client.get_run(ghost.info.run_id).info.lifecycle_stage for ghost in ghosts} == {"deleted"}


@pytest.mark.parametrize("noted", [True, False])
def test_a_note_that_finds_no_room_ends_no_training(tmp_path, database, monkeypatch, caplog, noted):
    tracker = start(database, tmp_path)
    if not noted:
        (tmp_path / "run-1" / "spool" / "run.json").unlink(missing_ok=True)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    rank = pickle.loads(pickle.dumps(tracker))
    rank.metrics({"train/loss": 1.0}, step=1)
    assert ("No space left on device; runs.py sync would not find it" in caplog.text) is not noted
    assert rank.flush(timeout_seconds=30) == 0
    assert points(database, tracker.run_id, "train/loss") == [(1, 1.0)]


def test_a_deleted_run_is_not_silently_made_anew(tmp_path, database):
    tracker = start(database, tmp_path)
    close_run(tracker, "FINISHED")
    MlflowClient(database).delete_run(tracker.run_id)
    with pytest.raises(TrackingError, match="is deleted in MLflow; restore it there"):
        start(database, tmp_path)


def test_a_metric_that_mlflow_never_takes_does_not_hold_up_the_others(tmp_path, database):
    tracker = start(database, tmp_path)
    tracker.metrics({"train/loss": 1.0}, step=1)
    tracker.metrics({"no?good": 1.0}, step=1)
    tracker.metrics({"train/loss": 2.0}, step=2)
    assert tracker.flush(timeout_seconds=30) == 0
    close_run(tracker, "FINISHED")
    assert points(database, tracker.run_id, "train/loss") == [(1, 1.0), (2, 2.0)]
    assert "no?good" in (tracker.spool / "refused.jsonl").read_text()


HOLD_RUN = """
import sys, time
from pathlib import Path
from tests.tracking.test_mlflow_tracker import start
start(sys.argv[1], Path(sys.argv[2]))
print("open", flush=True)
time.sleep(600)
"""


def test_a_run_whose_process_was_killed_is_reaped_and_a_living_one_is_not(tmp_path, database):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD_RUN, database, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "open\n"
    living = start(database, tmp_path, name="run-2")
    client = client_of(database)
    assert reap(client) == []
    process.kill()
    process.wait()
    process.stdout.close()
    [dead] = reap(client)
    assert dead.name == "run-1"
    run = client.get_run(dead.run_id)
    assert run.info.status == "FAILED"
    assert f"its process {process.pid} on this machine is dead" in run.data.tags["adaconv.error"]
    assert client.get_run(living.run_id).info.status == "RUNNING"
    again = start(database, tmp_path)  # taken up: the same run, no longer failed
    assert again.run_id == dead.run_id
    run = client.get_run(dead.run_id)
    assert (run.info.status, run.data.tags.get("adaconv.error")) == ("RUNNING", None)
    close_run(again, "FINISHED")
    close_run(living, "FINISHED")


def test_a_run_of_another_machine_is_dead_after_fifteen_silent_minutes(tmp_path, database):
    tracker = start(database, tmp_path)
    tracker.release()
    client = client_of(database)
    client.set_tag(tracker.run_id, "adaconv.process", "elsewhere/0/0 1 1.00")
    assert reap(client, now=time.time() + 14 * 60) == []
    [dead] = reap(client, now=time.time() + 16 * 60)
    assert dead.why == "no sign of life for 16 minutes"


def test_a_run_that_was_taken_for_dead_says_that_it_goes_on(tmp_path, database, monkeypatch):
    """Its server was away for a while, and somebody reaped before its next sign of life."""
    tracker, client = start(database, tmp_path), client_of(database)
    client.set_tag(tracker.run_id, "adaconv.process", "elsewhere/0/0 1 1.00")
    [dead] = reap(client, now=time.time() + 16 * 60)
    assert client.get_run(dead.run_id).info.status == "FAILED"
    monkeypatch.setattr(mlflow_tracker, "_BEAT_SECONDS", 0.5)
    tracker._heart.set()
    tracker.start_heartbeat()
    deadline = time.monotonic() + 30
    while client.get_run(dead.run_id).info.status != "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert client.get_run(dead.run_id).info.status == "RUNNING"
    close_run(tracker, "FINISHED")
    run = client.get_run(dead.run_id)
    assert (run.info.status, run.data.tags.get("adaconv.error")) == ("FINISHED", None)


def test_what_mlflow_tells_a_page_at_a_time_is_read_to_its_end(tmp_path, database, monkeypatch):
    """Pages of one instead of a thousand: the newest experiment is alone on the first."""
    for name in ("search_experiments", "search_runs"):
        search = getattr(MlflowClient, name)
        monkeypatch.setattr(MlflowClient, name, lambda *a, search=search, **how: search(*a, **how | {"max_results": 1}))
    client = client_of(database)
    for number in range(3):
        tracker = start(database, tmp_path / str(number), name=f"run-{number}")
        tracker.release()
        client.set_tag(tracker.run_id, "adaconv.process", "elsewhere/0/0 1 1.00")
        client.create_experiment(f"newer {number}")
    assert find(client, "run-0").info.run_name == "run-0"
    assert ping(database) == 5  # and MLflow's own
    assert {one.name for one in reap(client, now=time.time() + 16 * 60)} == {"run-0", "run-1", "run-2"}


@pytest.mark.slow
def test_a_server_that_is_down_from_start_to_end_gets_everything_later(tmp_path, monkeypatch):
    """Nothing is known of the server until long after the end: one run, every step, the true status and time."""
    monkeypatch.setattr(mlflow_tracker, "_END_PATIENCE_SECONDS", 2)
    server = MlflowServer(tmp_path / "server")  # not started
    began_ms = time.time() * 1000
    tracker = start(server.uri, tmp_path)
    assert tracker.run_id is None
    rank = pickle.loads(pickle.dumps(tracker))
    for step in range(1, 30):
        rank.metrics({"train/loss": float(step)}, step=step)
    rank.image("samples/grid", np.zeros((8, 8, 3), np.uint8), step=10)
    rank.close()
    tracker.start_heartbeat()
    assert not close_run(tracker, "FAILED", error="a reason")
    ended_ms = time.time() * 1000
    server.start()
    try:
        synced, left = sync(tracker.spool, timeout_seconds=60)
        assert left == 0
        run = MlflowClient(server.uri).get_run(synced.run_id)
        assert (run.info.status, run.data.tags["adaconv.error"]) == ("FAILED", "a reason")
        assert began_ms - 1000 < run.info.start_time < run.info.end_time < ended_ms
        assert points(server.uri, synced.run_id, "train/loss") == [(step, float(step)) for step in range(1, 30)]
        assert sync(tracker.spool)[1] == 0
        assert len(MlflowClient(server.uri).search_runs([run.info.experiment_id])) == 1
    finally:
        server.kill()


def test_another_server_gets_all_of_a_run(tmp_path, database, caplog):
    """Also what the first one took; and the run is the second one's from then on."""
    tracker, other = start(database, tmp_path), f"sqlite:///{tmp_path / 'other' / 'mlflow.db'}"
    (tmp_path / "other").mkdir()
    for step in (1, 2):
        tracker.metrics({"train/loss": float(step)}, step=step)
    tracker.image("samples/grid", np.zeros((8, 8, 3), np.uint8), step=1)
    assert close_run(tracker, "FINISHED")
    line = {"kind": "metrics", "step": 3, "timestamp_ms": 1, "values": {"train/loss": 3.0}}
    with (tracker.spool / "records.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    nobody = f"http://127.0.0.1:{free_port()}"  # a typo must not become where the run is told
    with pytest.raises(TrackingError, match=f"{nobody} does not answer"):
        sync(tracker.spool, uri=nobody)
    assert json.loads((tracker.spool / "run.json").read_text())["uri"] == database
    moved, left = sync(tracker.spool, uri=other)
    assert left == 0
    assert sorted(points(other, moved.run_id, "train/loss")) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    run = MlflowClient(other).get_run(moved.run_id)
    assert run.info.status == "FINISHED"
    assert Path(run.info.artifact_uri.removeprefix("file://")).is_relative_to(tmp_path / "other")
    assert f"told to {other} from its beginning; pictures that {database} took are there alone" in caplog.text
    again, left = sync(tracker.spool)
    assert (again.uri, again.run_id, left) == (other, moved.run_id, 0)
    assert caplog.text.count("from its beginning") == 1


def test_a_rank_that_hangs_stops_neither_its_successor_nor_the_run(tmp_path, database, monkeypatch):
    """It still holds the spool; the next rank tells through another one. Handing over waits for whoever tells."""
    monkeypatch.setattr(spool_module, "_OWNER_GOES_SECONDS", 0.2)
    tracker = start(database, tmp_path)
    hanging, successor = (pickle.loads(pickle.dumps(tracker)) for _ in range(2))
    hanging.metrics({"train/loss": 1.0}, step=1)
    successor.metrics({"train/loss": 1.0}, step=1)
    successor.metrics({"train/loss": 2.0}, step=2)
    with pytest.raises(TrackingError, match="driver: another process tells this run"):
        sync(tracker.spool)
    tracker.release()
    with pytest.raises(TrackingError, match="lock: another process tells this run"):
        sync(tracker.spool)
    tracker.claim()
    assert hanging.flush(timeout_seconds=20) == 0
    assert successor.flush(timeout_seconds=20) == 0
    hanging.close()
    successor.close()
    close_run(tracker, "FINISHED")
    assert {step for step, _ in points(database, tracker.run_id, "train/loss")} == {1, 2}


def test_a_rank_refuses_a_database_that_is_another_one_where_it_runs(tmp_path, database):
    """As on another machine, where the same path names no file, or one of other runs."""
    tracker, file = start(database, tmp_path), tmp_path / "mlflow.db"
    telling = pickle.dumps(tracker)
    file.rename(tmp_path / "there.db")
    with pytest.raises(TrackingError, match="expected the database that the run was opened in"):
        pickle.loads(telling).metrics({"train/loss": 1.0}, step=1)
    assert not file.exists()
    shutil.copy(tmp_path / "there.db", file)
    with pytest.raises(TrackingError, match="found another one"):
        pickle.loads(telling).metrics({"train/loss": 1.0}, step=1)
    (tmp_path / "there.db").replace(file)
    assert close_run(tracker, "FINISHED")


@pytest.mark.parametrize("when", [pytest.param("start", marks=SLOW), "middle", pytest.param("end", marks=SLOW)])
def test_a_locked_database_is_waited_for(tmp_path, database, monkeypatch, when):
    """Another process holds SQLite's lock for longer than its clients wait and than we do."""
    monkeypatch.setattr(mlflow_tracker, "_START_PATIENCE_SECONDS", 1)
    monkeypatch.setattr(mlflow_tracker, "_END_PATIENCE_SECONDS", 1)
    close_run(start(database, tmp_path, name="run-0"), "FINISHED")
    lock = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)

    def told(tracker):
        for step in range(100):
            tracker.metrics({"train/loss": float(step)}, step=step)

    if when == "start":
        lock.execute("BEGIN EXCLUSIVE")
    tracker = start(database, tmp_path)
    assert (tracker.run_id is None) == (when == "start")
    if when == "middle":
        lock.execute("BEGIN EXCLUSIVE")
    began = time.monotonic()
    told(tracker)
    assert time.monotonic() - began < 4.5  # one call that waited for the lock would have taken SQLite's 5 s
    if when == "end":
        assert tracker.flush(timeout_seconds=60) == 0
        lock.execute("BEGIN EXCLUSIVE")
        assert not close_run(tracker, "FINISHED")
    lock.execute("ROLLBACK")
    lock.close()
    if when == "end":
        assert sync(tracker.spool)[1] == 0
        again, left = sync(tracker.spool)  # when there is nothing to do
        assert (again.run_id is not None, left) == (True, 0)
    else:
        assert tracker.flush(timeout_seconds=60) == 0
        assert close_run(tracker, "FINISHED")
    client = MlflowClient(database)
    [run] = client.search_runs(["1"], "tags.`adaconv.run` = 'run-1'")
    assert run.info.status == "FINISHED"
    assert points(database, run.info.run_id, "train/loss") == [(step, float(step)) for step in range(100)]


def test_a_second_process_does_not_train_the_same_run(tmp_path, database, monkeypatch):
    monkeypatch.setattr(spool_module, "_OWNER_GOES_SECONDS", 0.2)
    first = start(database, tmp_path)
    with pytest.raises(TrackingError, match=r"run run-1: .* another process .* --resume none or --name"):
        start(database, tmp_path)
    assert MlflowClient(database).get_run(first.run_id).info.status == "RUNNING"
    close_run(first, "FINISHED")
    close_run(start(database, tmp_path), "FINISHED")


def elsewhere(client, run_id, sign: int) -> None:
    """As the driver of another machine signs, whose clock is five minutes behind."""
    client.set_tag(run_id, "adaconv.process", "elsewhere/0/0 1 1.00")
    client.set_tag(run_id, "adaconv.alive", str(int(time.time() * 1000) - 300_000 + sign))


def test_a_run_that_another_machine_trains_is_left_to_it(tmp_path, database, monkeypatch, caplog):
    """They share a store of objects and no disk, so that no lock keeps them apart."""
    monkeypatch.setattr(mlflow_tracker, "_BEAT_SECONDS", 0.5)
    tracker, client = start(database, tmp_path / "there"), client_of(database)
    tracker.release()
    signs = itertools.count()
    with repeatedly(lambda: elsewhere(client, tracker.run_id, next(signs)), seconds=0.2):
        time.sleep(0.5)
        with pytest.raises(TrackingError, match=r"run run-1: process elsewhere/0/0 1 .* --resume none or --name"):
            start(database, tmp_path / "here")
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.data.tags["adaconv.process"]) == ("RUNNING", "elsewhere/0/0 1 1.00")
    taken_up = start(database, tmp_path / "here")  # its driver is lost, with its machine
    assert taken_up.run_id == tracker.run_id
    assert "its driver was lost unless it gives a sign of life" in caplog.text
    assert client.get_run(tracker.run_id).data.tags["adaconv.process"] == process_here()
    assert close_run(taken_up, "FINISHED")


def test_two_drivers_that_began_at_once_say_so(tmp_path, database, monkeypatch, caplog):
    monkeypatch.setattr(mlflow_tracker, "_BEAT_SECONDS", 0.5)
    tracker, client = start(database, tmp_path), client_of(database)
    signs, deadline = itertools.count(), time.monotonic() + 30
    with repeatedly(lambda: elsewhere(client, tracker.run_id, next(signs)), seconds=0.1):
        while "end one of the two" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.1)
    assert "run run-1 is trained by process elsewhere/0/0 1 1.00 as well" in caplog.text
    assert close_run(tracker, "FINISHED")


def test_a_run_that_is_stopped_while_it_is_opened_is_killed(tmp_path, database, monkeypatch):
    def stopped(self, *, timeout_seconds):
        raise Interrupted("stopped")

    monkeypatch.setattr(mlflow_tracker.MlflowTracker, "wait_for_server", stopped)
    with pytest.raises(Interrupted):
        start(database, tmp_path)
    client = client_of(database)
    assert find(client, "run-1").info.status == "KILLED"


def test_a_clock_that_is_put_back_hides_no_status(tmp_path, database, monkeypatch):
    tracker, now = start(database, tmp_path), time.time()
    monkeypatch.setattr(spool_module.time, "time", lambda: now - 3600)
    assert close_run(tracker, "FINISHED")
    assert MlflowClient(database).get_run(tracker.run_id).info.status == "FINISHED"
    again = start(database, tmp_path)
    assert MlflowClient(database).get_run(tracker.run_id).info.status == "RUNNING"
    assert close_run(again, "KILLED")
    assert MlflowClient(database).get_run(tracker.run_id).info.status == "KILLED"


def test_a_picture_that_a_loss_of_power_cut_holds_nothing_up(tmp_path, database, monkeypatch, caplog):
    tracker = start(database, tmp_path)
    monkeypatch.setattr(mlflow_tracker.MlflowClient, "log_artifact", Mock(side_effect=ConnectionError("away")))
    tracker.image("samples/grid", np.zeros((8, 8, 3), np.uint8), step=1)
    tracker.close()
    monkeypatch.undo()
    [picture] = (tracker.spool / "images").iterdir()
    picture.write_bytes(b"")
    tracker.metrics({"train/loss": 1.0}, step=2)
    assert close_run(tracker, "FINISHED")
    assert "picture samples/grid of step 1 is lost" in caplog.text
    assert points(database, tracker.run_id, "train/loss") == [(2, 1.0)]


def test_a_run_that_ends_while_reap_looks_is_not_reaped(tmp_path, database, monkeypatch):
    tracker = start(database, tmp_path)
    client = client_of(database)

    def ends(run, now):
        close_run(tracker, "FINISHED")
        return "dead"

    monkeypatch.setattr(runs, "_why_dead", ends)
    assert reap(client) == []
    assert client.get_run(tracker.run_id).info.status == "FINISHED"


def test_a_folder_that_was_moved_is_told_from_one_that_is_empty(tmp_path):
    """Its database names artifacts where they were; new ones would begin there, and be found nowhere."""
    (tmp_path / "old").mkdir()
    tracker = start(f"sqlite:///{tmp_path}/old/mlflow.db", tmp_path / "old")
    tracker.image("samples/grid", np.zeros((8, 8, 3), np.uint8), step=1)
    assert close_run(tracker, "FINISHED")
    new = (tmp_path / "old").rename(tmp_path / "new place")
    uri, spool = f"sqlite:///{new}/mlflow.db", new / "run-1" / "spool"
    with pytest.raises(TrackingError, match=rf"expected MLflow's database at {tmp_path}/old/mlflow.db, found none"):
        sync(spool)
    told = f"its folder was moved. .* ln -s '{new}' {tmp_path}/old(;.*)?$"
    for call in (lambda: runs.reader_of(uri), lambda: sync(spool, uri=uri), lambda: start(uri, new, name="run-2")):
        with pytest.raises(TrackingError, match=told):
            call()
    assert not (tmp_path / "old").exists()
    (tmp_path / "old").symlink_to(new)
    assert sync(spool, uri=uri)[1] == 0
    assert [step for _, step, _ in runs.logged_images(runs.reader_of(uri), tracker.run_id)] == [1]
    again = start(uri, new)
    assert again.run_id == tracker.run_id
    assert close_run(again, "FINISHED")
