"""One training is one MLflow run, whatever happens.

driver   open_run() makes the run, or finds it again by its tag -> MlflowTracker, which travels to the first rank
         close_run() ends it with its true status
rank 0   MlflowTracker: metrics, images and checkpoints through a spool on disk (spool.py)
later    sync() hands over what an outage left in a spool

Nobody waits for the server. Where it is down when a run is opened, whoever first reaches it makes the run; where it is
down when a run ends, the status waits in the spool behind the metrics.
"""

import contextlib
import json
import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray
from PIL import Image

from adaconv.errors import Interrupted, TrackingError
from adaconv.scratch import scratch_folder
from adaconv.tracking import provenance
from adaconv.tracking.runs import (
    ALIVE_TAG,
    PROCESS_TAG,
    RunDescription,
    change_params,
    client_of,
    database_file,
    find_run,
    goes_on,
    is_permanent,
    iso,
    logged_images,
    make_or_find,
    ping,
    process_here,
    reader_of,
    revive,
    set_status,
)
from adaconv.tracking.spool import Record, Refused, Spool, own
from adaconv.tracking.system_metrics import SystemMetrics
from adaconv.tracking.tracker import flatten

log = logging.getLogger(__name__)

CHECKPOINTS_FILE = "checkpoints.json"
_METRICS_AT_ONCE = 1000  # MLflow's limit
_START_PATIENCE_SECONDS, _END_PATIENCE_SECONDS = 60.0, 30.0
_BEAT_SECONDS, _BEATS_WAITED_FOR = 20.0, 3
_UI_SIDE = 256  # of the small copy of a picture that MLflow's pages show

Status = Literal["FINISHED", "FAILED", "KILLED"]


def open_run(
    *,
    uri: str,
    experiment: str,
    identity: str,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    datasets: Mapping[str, tuple[str, str]],
    config_yaml: str,
    spool_directory: Path,
) -> "MlflowTracker":
    """Make the run of this identity, or take up the one that exists.

    Where the server does not answer the training goes on: the run is made when it does.

    Args:
        uri: of the tracking server or database.
        experiment: made if need be.
        identity: of the run (`runs.identity_of`); runs are found again by it, through a tag.
        name: of the run, for people; several runs may have it.
        params: nested configuration, logged when the run is made; what a later start changes becomes tags.
        tags: further tags, also renewed when a run is taken up.
        datasets: context (`content`, `style`) to (source URI, root hash).
        config_yaml: kept as the artifact `config.yaml`.
        spool_directory: where the first rank keeps what is not handed over yet.

    Raises:
        TrackingError: the server answers and refuses: credentials, a deleted run or experiment, no MLflow at all. Or
            another process trains this run, on this machine or on another one.
    """
    code = Path(__file__).parents[1]  # the package
    flat = flatten(params)
    description = RunDescription(
        experiment=experiment,
        identity=identity,
        name=name,
        params=flat,
        tags={
            **tags,
            **provenance.git_tags(code),
            "mlflow.source.name": "pipelines/train.py",
            "mlflow.user": provenance.user(),
        },
        datasets=datasets,
        files={"config.yaml": config_yaml, **provenance.files(code)},
        started_ms=int(time.time() * 1000),
    )
    tracker = MlflowTracker(uri, description, spool_directory)
    try:
        tracker.claim()
        tracker.wait_for_other_driver()
    except BlockingIOError as error:
        tracker.release()
        raise TrackingError(
            f"run {name}: {error}. Wait for its end, or begin another run with --resume none or --name"
        ) from error
    except OSError as error:
        raise TrackingError(f"cannot keep a spool in {spool_directory}: {error}") from error
    except BaseException:
        tracker.release()
        raise
    try:
        tracker.status(
            "RUNNING", params=flat, tags={**description.tags, PROCESS_TAG: process_here(), ALIVE_TAG: _now()}
        )
        problem = tracker.wait_for_server(timeout_seconds=_START_PATIENCE_SECONDS)
        tracker.database = _inode(uri)
    except (KeyboardInterrupt, Interrupted):
        close_run(tracker, "KILLED")
        raise
    except OSError as error:
        tracker.release()
        raise TrackingError(f"cannot keep a spool in {spool_directory}: {error}") from error
    finally:
        tracker.close()
    if is_permanent(problem):
        tracker.release()
        raise TrackingError(f"cannot open a run at {uri}: {problem}; pipelines/doctor.py checks tracking") from problem
    if problem:
        log.warning(
            "tracking: %s does not answer; training goes on, and the run is made when it does. Until then everything "
            "is kept in %s. The answer was: %s",
            *(uri, spool_directory, problem),
        )
    tracker.start_heartbeat()
    return tracker


def close_run(tracker: "MlflowTracker", status: Status, *, error: str | None = None) -> bool:
    """End the run with its true status; an outage is a warning, not the end of a finished training.

    Returns:
        whether everything is handed over, the status as well.
    """
    tracker.release()
    try:
        tracker.status(status, error=error)
        left = tracker.flush(timeout_seconds=_END_PATIENCE_SECONDS)
    except OSError as problem:
        log.warning("tracking: run %s could not be marked %s: %s", tracker.description.name, status, problem)
        return False
    finally:
        tracker.close()
    if left:
        log.warning(
            "tracking: %d records wait in %s; python pipelines/runs.py sync --runs %s hands them over",
            *(left, tracker.spool, tracker.spool.parents[1]),
        )
    return not left


def sync(spool_directory: Path, *, uri: str | None = None, timeout_seconds: float = 300) -> tuple["MlflowTracker", int]:
    """Hand over what waits in the spool of a run that is not going on.

    Args:
        spool_directory: of a run, as open_run made it.
        uri: of a tracking server, where it is another one by now: it gets all that the run told, and what comes.
        timeout_seconds: for all of it.

    Returns:
        the run's tracker, and how many records are left.

    Raises:
        TrackingError: the run is going on or gone, the server refuses, or what lies there is no spool.
    """
    try:
        told = json.loads((spool_directory / "run.json").read_text())
        file = database_file(uri or told["uri"])
        if not uri or (file and file.exists()):
            reader_of(uri or told["uri"])  # one that is not there must not be made anew: its folder was moved
        if uri and uri != told["uri"]:
            ping(uri)  # one that does not answer must not become the run's own
        tracker = MlflowTracker(uri or told["uri"], RunDescription(**told["description"]), spool_directory)
        tracker.claim()
        try:
            tracker.take_over()
            left = tracker.flush(timeout_seconds=timeout_seconds)
            problem = tracker.problem
        finally:
            tracker.close()
            tracker.release()
        if tracker.run_id is None and not left:  # nothing waited, so nobody asked for it
            described = tracker.description
            tracker.run_id = find_run(client_of(tracker.uri), described.experiment, described.identity)
    except (OSError, ValueError, KeyError, TypeError, MlflowException) as error:
        raise TrackingError(f"cannot hand over {spool_directory}: {error}") from error
    if left and is_permanent(problem):
        raise TrackingError(f"{tracker.uri} refuses what {spool_directory} holds: {problem}")
    if tracker.run_id is None and not left:
        raise TrackingError(
            f"{tracker.uri} has no run '{tracker.description.name}' of {spool_directory}, of which nothing waits: "
            "if it was deleted, restore it in MLflow"
        )
    return tracker, left


class MlflowTracker:
    """A run, told about from one process at a time. Pickles to its address; threads start on first use."""

    def __init__(self, uri: str, description: RunDescription, spool_directory: Path) -> None:
        self.uri, self.description, self.spool = uri, description, spool_directory
        self.run_id: str | None = None  # until the server was reached
        self.database: int | None = None  # inode of a SQLite file, where the run was opened
        self._start()

    def _start(self) -> None:
        self._spool: Spool | None = None
        self._client: MlflowClient | None = None
        self._system: SystemMetrics | None = None
        self._heart: threading.Event | None = None
        self._driver: int | None = None  # the file that says so, locked
        self._step, self._elsewhere = 0, False

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()
        self._elsewhere = True

    def reference(self) -> dict[str, str | None]:
        """What a checkpoint keeps, so that its run is found again."""
        told = self.description
        return {
            "run_id": self.run_id,
            "run": told.name,
            "identity": told.identity,
            "experiment": told.experiment,
            "tracking_uri": self.uri,
        }

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        self._step = step
        self._tell("metrics", step, _finite(values))
        if self._system is None:
            self._system = SystemMetrics(lambda found: self._tell("metrics", self._step, _finite(found)))

    def image(self, key: str, pixels: NDArray[np.uint8], *, step: int) -> None:
        spool, name = self._open(), uuid.uuid4().hex
        try:
            Image.fromarray(pixels).save(spool.images / f"{name}.png", compress_level=1)
        except OSError as error:
            log.warning("tracking: picture %s of step %d is lost: %s", key, step, error)
            return
        self._tell("image", step, {"key": key, "file": f"{name}.png"})

    def checkpoint(self, uri: str, *, step: int) -> None:
        self._tell("checkpoint", step, {"uri": uri})

    def take_over(self) -> None:
        """Become the one process that tells this run; a server that was not the one so far is told all of it.

        Raises:
            BlockingIOError: another one does.
        """
        note, before = self.spool / "run.json", self.uri
        with contextlib.suppress(FileNotFoundError, ValueError):
            before = json.loads(note.read_text())["uri"]
        self._spool = Spool(self.spool, self._deliver, from_start=before != self.uri)
        if before != self.uri:
            log.warning(
                "tracking: run %s is told to %s from its beginning; pictures that %s took are there alone",
                *(self.description.name, self.uri, before),
            )
        self._note(note, json.dumps({"uri": self.uri, "description": asdict(self.description)}, indent=1))

    def _note(self, note: Path, text: str) -> None:
        """For `runs.py sync`. A full disk ends no training: what is told waits in memory."""
        aside = note.with_name(f"{note.name}.{os.getpid()}")
        try:
            if not note.exists() or note.read_bytes() != text.encode():
                aside.write_text(text)
                aside.replace(note)
        except OSError as error:
            aside.unlink(missing_ok=True)
            log.warning("tracking: cannot note of which server the run is: %s; runs.py sync would not find it", error)

    def status(self, status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"], **more: Any) -> None:
        """Say how the run is; kept in order with everything else that was told."""
        self._tell("status", 0, {"status": status, **more})

    def flush(self, *, timeout_seconds: float) -> int:
        return self._open().flush(timeout_seconds=timeout_seconds)

    def wait_for_server(self, *, timeout_seconds: float) -> Exception | None:
        """Hand over until nothing is left, or until the first failure, which is returned."""
        spool, deadline = self._open(), time.monotonic() + timeout_seconds
        while spool.flush(timeout_seconds=0.2):
            if spool.problem or time.monotonic() > deadline:
                return spool.problem or TimeoutError(f"no answer in {timeout_seconds:.0f} s")
        return None

    @property
    def problem(self) -> Exception | None:
        return self._open().problem

    def close(self) -> None:
        if self._system is not None:
            self._system.stop()
            self._system = None
        if self._spool is not None:
            self._spool.close()
            self._spool = None

    def start_heartbeat(self) -> None:
        """Sign again and again that this process, the driver, is alive; a thread does."""
        self._heart = threading.Event()
        threading.Thread(target=self._beat, args=(self._heart,), name="tracking-heartbeat", daemon=True).start()

    def claim(self) -> None:
        """Become the one driver of this run on this machine, or the one process that hands over what it left.

        Raises:
            BlockingIOError: there is another one.
        """
        folder = self.spool.with_name("spool")  # the run's, also where a rank told through one of its own
        folder.mkdir(parents=True, exist_ok=True)
        self._driver = own(folder / "driver")

    def wait_for_other_driver(self) -> None:
        """Where the server says that another process drives this run: for as long as a sign of its life may take.

        That a sign is new tells the living from the lost, not its time: two machines have two clocks. Of a server that
        does not answer nothing is to be learnt.

        Raises:
            BlockingIOError: it gave one.
        """
        before = self._other_driver()
        if before is None:
            return
        who, seconds = before[0], _BEATS_WAITED_FOR * _BEAT_SECONDS
        log.warning(
            "tracking: run %s is RUNNING, by process %s; its driver was lost unless it gives a sign of life in %.0f s",
            *(self.description.name, who, seconds),
        )
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, _BEAT_SECONDS / 4))
            now = self._other_driver()
            if now is None:  # it has ended
                return
            if now != before:
                raise BlockingIOError(f"process {who} trains it, and is alive")

    def _other_driver(self) -> tuple[str, str] | None:
        """Who else drives this run, as the server knows, and the last sign of life."""
        try:
            client = client_of(self.uri)
            run_id = find_run(client, self.description.experiment, self.description.identity)
            run = client.get_run(run_id) if run_id else None
        except Exception as error:  # it will be told when the run is opened
            log.debug("tracking: cannot ask who drives run %s: %s", self.description.name, error)
            return None
        if run is None or not goes_on(run) or run.data.tags.get(PROCESS_TAG) in (None, process_here()):
            return None
        return run.data.tags[PROCESS_TAG], run.data.tags.get(ALIVE_TAG, "")

    def release(self) -> None:
        """Drive the run no longer, and give no signs of life."""
        if self._heart is not None:
            self._heart.set()
            self._heart = None
        if self._driver is not None:
            os.close(self._driver)
            self._driver = None

    def _beat(self, stop: threading.Event) -> None:
        signed = False
        while not stop.wait(_BEAT_SECONDS):
            try:
                client = client_of(self.uri)
                if signed and (other := self._other_driver()):  # both began before either had signed
                    log.warning(
                        "tracking: run %s is trained by process %s as well; end one of the two",
                        *(self.description.name, other[0]),
                    )
                self.run_id = self.run_id or find_run(client, self.description.experiment, self.description.identity)
                if self.run_id:
                    tags, signed = {PROCESS_TAG: process_here(), ALIVE_TAG: _now()}, True
                    client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in tags.items()])
                    revive(client, self.run_id)
            except Exception as error:  # an outage; the spool speaks of it
                log.debug("tracking: no sign of life given: %s", error)

    def _tell(self, kind: Literal["metrics", "image", "checkpoint", "status"], step: int, values: Any) -> None:
        self._open().append(kind, step, values)

    def _refuse_another_database(self) -> None:
        """The path of a SQLite file names, on another machine, none or one of other runs.

        Raises:
            TrackingError: the run was opened in another file than this path is here.
        """
        if self._elsewhere and self.database is not None and _inode(self.uri) != self.database:
            raise TrackingError(
                f"tracking.uri {self.uri}: expected the database that the run was opened in, found another one or none "
                f"on {socket.gethostname()}. Ranks on several machines need the http:// address of an MLflow server"
            )

    def _open(self) -> Spool:
        if self._spool is None:
            self._refuse_another_database()
            try:
                self.take_over()
            except BlockingIOError as error:  # a rank before this one hangs: no reason to stop the training
                self.spool = self.spool.with_name(f"{self.spool.name}-{os.getpid()}")
                log.warning("tracking: %s; this process tells through %s", error, self.spool)
                self.take_over()
        assert self._spool is not None
        return self._spool

    def _deliver(self, records: list[Record]) -> None:
        """Called from the spool's thread; leaves out what the run has already.

        After a failure nobody knows what arrived: the next call looks again.
        """
        try:
            if self._client is None:
                client = client_of(self.uri)
                self.run_id = str(make_or_find(client, self.description).info.run_id)
                self._logged = _Logged(client, self.run_id)
                self._client = client
            self._deliver_to(self._client, self.run_id or "", records)
        except Exception as error:
            refused = self._client is not None and getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE"
            self._client = None
            if refused:
                raise Refused(str(error)) from error
            raise

    def _deliver_to(self, client: MlflowClient, run_id: str, records: list[Record]) -> None:
        points = [
            Metric(key, float(value), record.timestamp_ms, record.step)
            for record in records
            if record.kind == "metrics"
            for key, value in record.values.items()
        ]
        fresh = {(p.key, p.step): p for p in reversed(points) if not self._logged.has_metric(p.key, p.step)}
        in_order = sorted(fresh.values(), key=lambda point: point.step)
        for first in range(0, len(in_order), _METRICS_AT_ONCE):
            chunk = in_order[first : first + _METRICS_AT_ONCE]
            client.log_batch(run_id, metrics=chunk)
            for point in chunk:
                self._logged.add_metric(point.key, point.step)
        for record in records:
            if record.kind == "image":
                self._deliver_image(client, run_id, record)
            elif record.kind == "status":
                self._deliver_status(client, run_id, record)
        if found := {r.step: r for r in records if r.kind == "checkpoint"}:
            self._deliver_checkpoints(client, run_id, found)

    def _deliver_image(self, client: MlflowClient, run_id: str, record: Record) -> None:
        """As MlflowClient.log_image does, but under names that are the same when it is done again."""
        key, file = record.values["key"], self.spool / "images" / Path(record.values["file"]).name
        if self._logged.has_image(key, record.step) or not file.exists():
            return
        name = f"{key.replace('/', '~')}+step+{record.step}+timestamp+{record.timestamp_ms}+{file.stem}"
        try:
            with Image.open(file) as image:
                small = image.copy()
        except (OSError, SyntaxError, ValueError) as error:  # not synced: a loss of power leaves it empty or cut
            log.warning("tracking: picture %s of step %d is lost: %s", key, record.step, error)
            return
        with scratch_folder("image") as scratch:
            small.thumbnail((_UI_SIDE, _UI_SIDE))
            small.save(scratch / f"{name}+compressed.webp")
            client.log_artifact(run_id, str(scratch / f"{name}+compressed.webp"), "images")
            whole = scratch / f"{name}.png"
            whole.write_bytes(file.read_bytes())
            client.log_artifact(run_id, str(whole), "images")  # last: it says that the step is there
        client.set_tag(run_id, "mlflow.loggedImages", "True")  # MLflow's pages look for images only with it
        self._logged.images.add((key, record.step))

    def _deliver_status(self, client: MlflowClient, run_id: str, record: Record) -> None:
        values, when = record.values, record.timestamp_ms
        set_status(client, run_id, values["status"], when_ms=when, error=values.get("error"))
        tags = [RunTag(name, value) for name, value in values.get("tags", {}).items()]
        client.log_batch(run_id, tags=tags)
        if change_params(client, client.get_run(run_id), values.get("params", {}), when_ms=when):
            client.log_text(run_id, self.description.files["config.yaml"], f"config-{iso(when).replace(':', '')}.yaml")

    def _deliver_checkpoints(self, client: MlflowClient, run_id: str, records: dict[int, Record]) -> None:
        """The newest as tags, all of them as an artifact."""
        told = {one["step"]: one for one in logged_checkpoints(client, run_id)}
        for step, r in records.items():
            if told.get(step, {}).get("uri") != r.values["uri"]:  # else it is told again, and keeps its time
                told[step] = {"step": step, "uri": r.values["uri"], "time_ms": r.timestamp_ms}
        client.log_text(run_id, json.dumps([told[step] for step in sorted(told)], indent=1), CHECKPOINTS_FILE)
        newest = records[max(records)]
        tags = {"adaconv.checkpoint": newest.values["uri"], "adaconv.checkpoint_step": str(newest.step)}
        client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])


class _Logged:
    """What a run has: the newest step of each metric at once; all steps of one only when it is told an older step."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._newest = {metric.key: metric.step for metric in client.get_run(run_id).data.to_proto().metrics}
        self._steps: dict[str, set[int]] = {}
        self.images = {(key, step) for key, step, _ in logged_images(client, run_id)}

    def has_metric(self, key: str, step: int) -> bool:
        if key not in self._newest or step > self._newest[key]:
            return False
        if key not in self._steps:
            self._steps[key] = {point.step for point in self._client.get_metric_history(self._run_id, key)}
        return step in self._steps[key]

    def add_metric(self, key: str, step: int) -> None:
        self._newest[key] = max(step, self._newest.get(key, step))
        if key in self._steps:
            self._steps[key].add(step)

    def has_image(self, key: str, step: int) -> bool:
        return (key, step) in self.images


def logged_checkpoints(client: MlflowClient, run_id: str) -> list[dict[str, Any]]:
    """Every checkpoint that a run told of: step, uri, time_ms; retention may have removed it since."""
    if CHECKPOINTS_FILE not in {artifact.path for artifact in client.list_artifacts(run_id)}:
        return []
    with scratch_folder("checkpoints") as scratch:
        found: list[dict[str, Any]] = json.loads(
            Path(client.download_artifacts(run_id, CHECKPOINTS_FILE, scratch)).read_text()
        )
    return found


def _inode(uri: str) -> int | None:
    """Of a SQLite file that is there; the same on all machines that share its folder."""
    try:
        return file.stat().st_ino if (file := database_file(uri)) else None
    except OSError:
        return None


def _finite(values: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no NaN; MLflow has."""
    return {key: value if math.isfinite(value) else str(value) for key, value in values.items()}


def _now() -> str:
    return str(int(time.time() * 1000))
