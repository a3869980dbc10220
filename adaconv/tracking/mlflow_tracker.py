"""One training is one MLflow run, whatever happens.

driver   open_run() makes the run, or finds it again by its tag -> MlflowTracker, which travels to the first rank
         close_run() ends it with its true status
rank 0   MlflowTracker: metrics, images and checkpoints through a spool on disk (spool.py)
"""

import logging
import math
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray
from PIL import Image

from adaconv.errors import TrackingError
from adaconv.tracking.spool import Record, Spool
from adaconv.tracking.tracker import flatten

log = logging.getLogger(__name__)

IDENTITY_TAG = "adaconv.run"
_LONGEST_PARAM, _PARAMS_AT_ONCE, _LONGEST_DIGEST = 6000, 100, 36  # MLflow's limits
_METRICS_AT_ONCE = 1000


def client_of(uri: str) -> MlflowClient:
    # MLflow's own retries would hold a thread for minutes; the spool retries for as long as it takes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Some of MLflow looks at the process's own setting, whatever the client was told.
    mlflow.set_tracking_uri(uri)
    return MlflowClient(uri)


def default_uri(uri: str | None, output: Path) -> str:
    """The tracking URI to use: the one given, else MLFLOW_TRACKING_URI, else a SQLite file in the output folder."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        return f"sqlite:///{output / 'mlflow.db'}"
    if uri.startswith("file:") or "://" not in uri:
        raise TrackingError(
            f"tracking.uri {uri}: MLflow no longer keeps runs in folders; use sqlite:////absolute/path.db or the "
            "http:// address of a server"
        )
    if re.match(r"[^/]+://[^/@]*:[^/@]+@", uri):
        raise TrackingError(
            f"tracking.uri {uri.partition('://')[0]}://…@{uri.rpartition('@')[2]} carries a password, which would be "
            "printed and kept with runs; give it in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, a "
            "database's by an MLflow server in front of it"
        )
    return uri


def open_run(
    *,
    uri: str,
    experiment: str,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    datasets: Mapping[str, tuple[str, str]],
    config_yaml: str,
    spool_directory: Path,
) -> "MlflowTracker":
    """Make the run of this name, or take up the one that exists.

    Args:
        uri: of the tracking server or database.
        experiment: made if need be.
        name: of the run; runs are found again by it, through a tag.
        params: nested configuration, logged when the run is made: MLflow's parameters cannot change.
        tags: further tags, also renewed when a run is taken up.
        datasets: context (`content`, `style`) to (source URI, root hash).
        config_yaml: kept as the artifact `config.yaml`.
        spool_directory: where the first rank keeps what is not handed over yet.

    Raises:
        TrackingError: the server or database cannot be reached or refuses.
    """
    try:
        client = client_of(uri)
        experiment_id = _experiment(client, uri, experiment, spool_directory.parents[1])
        run_id = _find(client, experiment_id, name)
        if run_id is None:
            run = client.create_run(experiment_id, run_name=name, tags={IDENTITY_TAG: name, **tags})
            run_id = str(run.info.run_id)
            flat = [Param(key, value[:_LONGEST_PARAM]) for key, value in flatten(params).items()]
            for first in range(0, len(flat), _PARAMS_AT_ONCE):
                client.log_batch(run_id, params=flat[first : first + _PARAMS_AT_ONCE])
            client.log_inputs(run_id, [_dataset(context, *found) for context, found in datasets.items()])
            client.log_text(run_id, config_yaml, "config.yaml")
        else:
            client.update_run(run_id, status="RUNNING")
            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    except (MlflowException, OSError) as error:
        raise TrackingError(f"cannot open a run at {uri}: {error}; pipelines/doctor.py checks tracking") from error
    return MlflowTracker(uri, run_id, experiment_id, spool_directory)


def close_run(
    tracker: "MlflowTracker", status: Literal["FINISHED", "FAILED", "KILLED"], *, error: str | None = None
) -> None:
    """End the run with its true status; an outage is a warning, not the end of a finished training."""
    left = tracker.flush(timeout_seconds=30)
    tracker.close()
    if left:
        log.warning("tracking: %d records wait in %s; the next start of this run hands them over", left, tracker.spool)
    try:
        client = client_of(tracker.uri)
        if error:
            client.set_tag(tracker.run_id, "adaconv.error", error[:4000])
        client.set_terminated(tracker.run_id, status)
    except (MlflowException, OSError) as problem:
        log.warning("tracking: run %s could not be marked %s: %s", tracker.run_id, status, problem)


def _experiment(client: MlflowClient, uri: str, name: str, output: Path) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        # A database has no place for artifacts of its own, and MLflow's default is the folder it happens to run in.
        location = (output / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
        return str(client.create_experiment(name, artifact_location=location))
    if found.lifecycle_stage != "active":
        raise TrackingError(f"experiment '{name}' at {uri} is deleted; restore it or choose --tracking.experiment")
    return str(found.experiment_id)


def _find(client: MlflowClient, experiment_id: str, name: str) -> str | None:
    found = client.search_runs(
        [experiment_id], f"tags.`{IDENTITY_TAG}` = '{name}'", run_view_type=ViewType.ACTIVE_ONLY, max_results=1
    )
    return str(found[0].info.run_id) if found else None


def _dataset(context: str, source: str, root_hash: str) -> DatasetInput:
    dataset = Dataset(name=context, digest=root_hash[:_LONGEST_DIGEST], source_type="adaconv", source=source)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


class MlflowTracker:
    """A run that exists, told about from one process at a time. Pickles to its address; threads start on first use."""

    def __init__(self, uri: str, run_id: str, experiment_id: str, spool_directory: Path) -> None:
        self.uri, self.run_id, self.experiment_id, self.spool = uri, run_id, experiment_id, spool_directory
        self._spool: Spool | None = None
        self._client: MlflowClient | None = None
        self._last_step: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_spool": None, "_client": None, "_last_step": {}}

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        # JSON has no NaN; MLflow has.
        self._open().append("metrics", step, {k: v if math.isfinite(v) else str(v) for k, v in values.items()})

    def image(self, key: str, pixels: NDArray[np.uint8], *, step: int) -> None:
        spool, file = self._open(), f"{uuid.uuid4().hex}.png"
        Image.fromarray(pixels).save(spool.images / file)
        spool.append("image", step, {"key": key, "file": file})

    def checkpoint(self, uri: str, *, step: int) -> None:
        self._open().append("tags", step, {"adaconv.checkpoint": uri, "adaconv.checkpoint_step": str(step)})

    def flush(self, *, timeout_seconds: float) -> int:
        return self._open().flush(timeout_seconds=timeout_seconds)

    def close(self) -> None:
        if self._spool is not None:
            self._spool.close()
            self._spool = None

    def _open(self) -> Spool:
        if self._spool is None:
            self._spool = Spool(self.spool, self._deliver)
        return self._spool

    def _deliver(self, records: list[Record]) -> None:
        """Called from the spool's thread; leaves out what the run has already."""
        if self._client is None:
            client = client_of(self.uri)
            self._last_step = _steps_logged(client, self.run_id)
            self._client = client
        fresh: list[Metric] = []
        last = dict(self._last_step)
        for record in records:
            if record.kind == "metrics":
                for key, value in record.values.items():
                    if record.step > last.get(key, -1):
                        last[key] = record.step
                        fresh.append(Metric(key, float(value), record.timestamp_ms, record.step))
        for first in range(0, len(fresh), _METRICS_AT_ONCE):
            self._client.log_batch(self.run_id, metrics=fresh[first : first + _METRICS_AT_ONCE])
        self._last_step.update({metric.key: metric.step for metric in fresh})
        for record in records:
            if record.kind == "image":
                self._deliver_image(self._client, record)
            elif record.kind == "tags":
                tags = [RunTag(key, value) for key, value in record.values.items()]
                self._client.log_batch(self.run_id, tags=tags)

    def _deliver_image(self, client: MlflowClient, record: Record) -> None:
        key, file = record.values["key"], self.spool / "images" / record.values["file"]
        if record.step > self._last_step.get(f"image:{key}", -1) and file.exists():
            with Image.open(file) as image:
                client.log_image(
                    self.run_id, image, key=key, step=record.step, timestamp=record.timestamp_ms, synchronous=True
                )
            self._last_step[f"image:{key}"] = record.step


def _steps_logged(client: MlflowClient, run_id: str) -> dict[str, int]:
    """The last step that the run has of each metric, and of each image series as `image:<key>`."""
    steps = {
        key: max(point.step for point in client.get_metric_history(run_id, key))
        for key in client.get_run(run_id).data.metrics
    }
    for artifact in client.list_artifacts(run_id, "images"):
        # MLflow names them `<key with ~ for />+step+<n>+timestamp+<ms>+<uuid>.png`
        key, _, rest = Path(artifact.path).name.partition("+step+")
        if rest:
            name = "image:" + key.replace("~", "/")
            steps[name] = max(steps.get(name, -1), int(rest.partition("+")[0]))
    return steps


def ping(uri: str) -> int:
    """How many experiments a tracking backend has.

    Raises:
        TrackingError: it does not answer.
    """
    try:
        return len(client_of(uri).search_experiments())
    except (MlflowException, OSError) as error:
        raise TrackingError(f"tracking: {uri} does not answer: {error}") from error
