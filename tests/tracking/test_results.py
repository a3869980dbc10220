"""What a run still lacks when it has ended, and whether it is told right."""

import json
import pickle

import pytest
from botocore.exceptions import EndpointConnectionError

from adaconv.errors import Interrupted, TrackingError
from adaconv.tracking import results, spool
from adaconv.tracking.mlflow_tracker import close_run, open_run
from adaconv.tracking.results import find, hand_over, keep_results, lacks_its_end
from adaconv.tracking.runs import client_of
from tests.tracking.grids import grid_of


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('results') / 'mlflow.db'}"


@pytest.fixture
def start(database, tmp_path):
    opened = []

    def start(name, *, identity=None):
        described = {"experiment": "test", "params": {"data": {"crop": 32}}, "tags": {}, "datasets": {}}
        folder = tmp_path / (identity or name)
        tracker = open_run(
            uri=database,
            identity=identity or name,
            name=name,
            config_yaml="",
            spool_directory=folder / "spool",
            **described,
        )
        opened.append(tracker)
        return tracker

    yield start
    for tracker in opened:
        tracker.release()


def test_a_run_lacks_its_end_until_it_is_finished_with_its_results(database, start, tmp_path):
    tracker = start("one")
    client = client_of(database)

    def lacks(run_id=tracker.run_id):
        return lacks_its_end(database, run_id, "test", "one")

    assert lacks()
    close_run(tracker, "FAILED", error="lost")
    keep_results(tracker, checkpoints=str(tmp_path / "none"))
    assert lacks()
    client.delete_tag(tracker.run_id, "adaconv.results")
    client.set_terminated(tracker.run_id, "FINISHED")
    assert lacks()
    assert keep_results(tracker, checkpoints=str(tmp_path / "none")) == {"page": None, "models": {}}
    assert not lacks()
    assert not lacks(None)  # found by its identity
    client.delete_tag(tracker.run_id, "adaconv.results")
    client.delete_run(tracker.run_id)
    assert not lacks()  # somebody's wish
    assert lacks_its_end(database, None, "test", "another")  # nobody has heard of it yet
    assert not lacks_its_end("http://127.0.0.1:9", tracker.run_id, "test", "one")


def test_a_run_that_goes_on_has_no_results_yet(database, start, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(spool, "_OWNER_GOES_SECONDS", 0.2)
    tracker = start("on")
    close_run(tracker, "FINISHED")
    keep_results(tracker, checkpoints=str(tmp_path / "none"))
    assert not lacks_its_end(database, tracker.run_id, "test", "on")
    longer = start("on")
    beside = pickle.loads(pickle.dumps(longer))
    keep_results(beside, checkpoints=str(tmp_path / "none"))  # as `sync` would
    assert "no page and no models of run on are made" in caplog.text
    longer.release()  # as if it drove from another machine, which a lock does not reach
    keep_results(beside, checkpoints=str(tmp_path / "none"))
    assert "adaconv.results" not in client_of(database).get_run(longer.run_id).data.tags
    close_run(longer, "FINISHED")
    assert lacks_its_end(database, tracker.run_id, "test", "on")


def test_a_store_of_artifacts_with_errors_of_its_own_ends_no_training(database, start, monkeypatch, caplog):
    """As an experiment whose artifacts lie in S3 has them."""
    tracker = start("store")
    tracker.image("samples/grid", grid_of(1, 1, side=32, step=0), step=0)
    close_run(tracker, "FINISHED")

    def refuse(*_):
        raise EndpointConnectionError(endpoint_url="http://127.0.0.1:9")

    monkeypatch.setattr(results, "keep_models", refuse)
    keep_results(tracker, checkpoints="none")
    assert "the page or the models of run store are missing: Could not connect" in caplog.text


def test_what_goes_wrong_with_results_is_a_warning_and_is_done_again(database, start, monkeypatch, tmp_path, caplog):
    tracker = start("two")
    tracker.image("samples/grid", grid_of(1, 1, side=32, step=0), step=0)
    close_run(tracker, "FINISHED")

    def refuse(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(results, "keep_models", refuse)
    page = str(tmp_path / "two" / "time-machine.html")
    assert keep_results(tracker, checkpoints="none") == {"page": page, "models": {}}
    assert "the page or the models of run two are missing: the disk is full" in caplog.text
    assert lacks_its_end(database, tracker.run_id, "test", "two")
    assert "time-machine.html" in [one.path for one in client_of(database).list_artifacts(tracker.run_id)]

    def stop(*_):
        raise Interrupted("SIGTERM")

    monkeypatch.setattr(results, "keep_models", stop)
    with pytest.raises(Interrupted):
        keep_results(tracker, checkpoints="none")


def test_what_waits_in_a_spool_is_handed_over_and_only_that(database, start, tmp_path, caplog):
    caplog.set_level("INFO")
    assert hand_over(tmp_path / "nothing", uri=database, checkpoints="none") == 0
    tracker = start("three")
    close_run(tracker, "FINISHED")
    assert hand_over(tracker.spool, uri=database, checkpoints="none") == 0
    assert lacks_its_end(database, tracker.run_id, "test", "three")
    line = {"kind": "metrics", "step": 1, "timestamp_ms": 1, "values": {"train/loss": 1.0}}
    with (tracker.spool / "records.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert hand_over(tracker.spool, uri=database, checkpoints=str(tmp_path / "none")) == 0
    assert [point.step for point in client_of(database).get_metric_history(tracker.run_id, "train/loss")] == [1]
    assert not lacks_its_end(database, tracker.run_id, "test", "three")
    assert caplog.text.count("handed over what waited in") == 1


def test_a_run_is_found_by_its_id_or_by_a_name_that_only_it_has(database, start):
    client = client_of(database)
    ann, bob, own = start("shared", identity="ann"), start("shared", identity="bob"), start("ann's", identity="own")
    assert find(client, ann.run_id).info.run_id == ann.run_id
    assert find(client, "ann's").info.run_id == own.run_id
    with pytest.raises(TrackingError, match="expected one run with id or name shared, found ") as refused:
        find(client, "shared")
    assert ann.run_id in str(refused.value)
    assert bob.run_id in str(refused.value)
