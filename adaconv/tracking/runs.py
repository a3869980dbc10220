"""Runs as MLflow keeps them: made once, found again by a tag, completed, changed, ended, and reaped where nobody did.

Every function here may be repeated: what is there already is left as it is.
"""

import logging
import os
import shlex
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import mlflow
import psutil
from botocore.exceptions import BotoCoreError, ClientError
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds

from adaconv import storage
from adaconv.config.base import refuse_password
from adaconv.errors import TrackingError
from adaconv.scratch import kept_folder

log = logging.getLogger(__name__)

IDENTITY_TAG, NAME_TAG = "adaconv.id", "adaconv.run"
ERROR_TAG, STATUS_TIME_TAG = "adaconv.error", "adaconv.status_time"
INITIAL_RUN_TAG = "adaconv.init_from.run_id"  # of the run whose model's weights this one began with
RESULTS_TAG = "adaconv.results"  # of a run whose page and models are there
_ARTIFACTS = "mlartifacts"  # beside a database
PROCESS_TAG, ALIVE_TAG = "adaconv.process", "adaconv.alive"
_LONGEST_PARAM, _LONGEST_TAG, _LONGEST_DIGEST, _AT_ONCE = 6000, 5000, 36, 100  # MLflow's limits, with room in tags
_REAPED = "; the same command takes the run up again"  # ends what is told of a run that was taken for dead
_SILENT_SECONDS = 15 * 60.0  # of a run on another machine, after which it counts as dead
# Of a server, a database, and the library behind a store of artifacts, whose errors are no OSErrors.
FAILURES = (MlflowException, OSError, BotoCoreError, ClientError)
# Answers that will be the same the second time.
_PERMANENT = {
    *("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "ENDPOINT_NOT_FOUND", "NOT_FOUND", "INVALID_STATE"),
    *("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED"),
}


@dataclass(frozen=True)
class RunDescription:
    """All that makes a run what it is, so that any process can make it, or find it again.

    Args:
        experiment: made if need be.
        identity: of the run, which it is found again by, through a tag.
        name: of the run, for people; several runs may have it.
        params: dotted names to texts.
        tags: more of them.
        datasets: context (`content`, `style`) to (source URI, root hash).
        files: artifacts, name to text; `config.yaml` is the resolved configuration.
        started_ms: when it began, which may be long before the server hears of it.
    """

    experiment: str
    identity: str
    name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    datasets: Mapping[str, tuple[str, str]]
    files: Mapping[str, str]
    started_ms: int


@dataclass(frozen=True)
class Reaped:
    run_id: str
    name: str
    why: str


def client_of(uri: str) -> MlflowClient:
    # MLflow's own retries would hold a thread for minutes; the spool retries for as long as it takes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name in ("mlflow", "alembic", "urllib3.connectionpool"):  # the spool speaks of an outage, once
        logging.getLogger(name).setLevel(logging.ERROR)
    # Some of MLflow looks at the process's own setting, whatever the client was told.
    mlflow.set_tracking_uri(uri)
    return MlflowClient(uri)


def database_file(uri: str) -> Path | None:
    """Of a SQLite database; None of a server."""
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    return Path(path).absolute() if uri.startswith("sqlite:///") else None


def reader_of(uri: str) -> MlflowClient:
    """The client of a backend that holds something already.

    Raises:
        TrackingError: a SQLite file that is not there: MLflow would make it, and find nothing in it. Or there is no
            client of such an address.
    """
    file = database_file(uri)
    if file and not file.exists():
        raise TrackingError(
            f"tracking: expected MLflow's database at {file}, found none; give --tracking.uri (of runs.py "
            "--tracking-uri) sqlite:////…/runs/mlflow.db with the output folder of the runs, or set MLFLOW_TRACKING_URI"
        )
    try:
        client = client_of(uri)
        experiments = every(client.search_experiments) if file else []
    except Exception as error:  # of whatever a scheme leads to
        raise TrackingError(f"tracking: {uri}: {str(error).partition(chr(10))[0]}") from error
    for experiment in experiments:
        _refuse_moved(experiment, file)
    return client


def _refuse_moved(experiment: Experiment, database: Path | None) -> None:
    """A database keeps the whole paths of its artifacts: moved with its folder, it finds none, and begins others there.

    Raises:
        TrackingError: it was moved.
    """
    place = urlsplit(experiment.artifact_location)
    was = Path(unquote(place.path))
    if database is None or place.scheme not in ("", "file") or was.name != _ARTIFACTS:
        return
    if not was.exists() and (database.parent / _ARTIFACTS).exists():
        raise TrackingError(
            f"tracking: {database} has its artifacts in {was}, and nothing is there: its folder was moved. Let the old "
            f"name lead to the new place: ln -s {shlex.quote(str(database.parent))} {shlex.quote(str(was.parent))}"
        )


def default_uri(uri: str | None, output: Path, *, found: str | None = None) -> str:
    """The tracking URI to use: the one given, else `found`, else MLFLOW_TRACKING_URI, else a SQLite file in the folder.

    With an absolute path, where it is a database's: other processes have other working directories.

    Args:
        uri: that the user gave.
        output: the folder.
        found: what a checkpoint names, which may be anybody's.

    Raises:
        TrackingError: a folder, which MLflow no longer takes; no address; it carries a password; or `found` is a server
            that the user's account is not known to be for.
    """
    from_checkpoint = not uri and bool(found)
    uri = uri or (found and found.strip()) or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:  # a variable may be set and empty
        return f"sqlite:///{output / 'mlflow.db'}"
    if uri.startswith("file:") or "://" not in uri:
        raise TrackingError(
            f"tracking.uri {uri}: MLflow no longer keeps runs in folders; use sqlite:////absolute/path.db or the "
            "http:// address of a server"
        )
    try:
        refuse_password(uri)
        _origin(uri)
        if from_checkpoint:
            _refuse_to_send_the_account(uri)
    except ValueError as error:
        raise TrackingError(f"tracking: {error}") from None
    scheme = "sqlite:///"
    return scheme + storage.absolute(uri.removeprefix(scheme)) if uri.startswith(scheme) else uri


def _origin(uri: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port.

    Raises:
        ValueError: it is no address.
    """
    parts = urlsplit(uri)  # which reads the scheme and the host in any case of letters
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _refuse_to_send_the_account(uri: str) -> None:
    """MLflow's client sends its account to whichever server it is told.

    Raises:
        ValueError: it may not be told to this one; or MLFLOW_TRACKING_URI is no address.
    """
    account = get_default_host_creds(uri)
    has_account = account.username or account.token or account.auth or account.aws_sigv4
    known = os.environ.get("MLFLOW_TRACKING_URI", "")
    if _origin(uri)[0] in ("http", "https") and has_account and _origin(uri) != _origin(known):
        raise ValueError(
            f"the checkpoint is of a run at {uri}, which would be sent your account of MLflow; "
            f"MLFLOW_TRACKING_URI names {known or 'no server'}. If it may have that, give --tracking.uri {uri}"
        )


def local_folder(output: str) -> Path:
    """Where runs of an output folder keep what must lie on a disk: there, or in the temporary folder for s3://."""
    if storage.is_local(output):
        return Path(storage.absolute(output))
    return kept_folder("runs")


def identity_of(run_folder: str) -> str:
    """A run's own random id, kept in its folder: the same settings in another folder are another run."""
    where = storage.join(run_folder, "id")
    storage.publish_if_absent(where, uuid.uuid4().hex.encode())
    return storage.read_bytes(where).decode()


def is_permanent(error: BaseException | None) -> bool:
    """Whether the server answered, and will answer so again; anything else is an outage."""
    if isinstance(error, MlflowException):
        return error.error_code in _PERMANENT
    return isinstance(error, TrackingError)


def make_or_find(client: MlflowClient, description: RunDescription) -> Run:
    """The run of this identity, made if need be, with all that belongs to it.

    Raises:
        MlflowException: the server does not answer, or refuses.
        TrackingError: the experiment or the run is deleted.
    """
    experiment_id = _experiment(client, description)
    found = _runs_of(client, experiment_id, description.identity)
    if not found:
        _refuse_deleted(client, experiment_id, description)
        client.create_run(
            experiment_id,
            start_time=description.started_ms,
            run_name=description.name,
            tags={IDENTITY_TAG: description.identity, NAME_TAG: description.name, **description.tags},
        )
        found = _runs_of(client, experiment_id, description.identity)
    # A request that was answered too late was made again by the client, and two processes may have been here at once:
    # all of them keep the first. What nobody wrote to, which may come later, goes.
    for ghost in (run for run in found[1:] if not run.data.params and not run.data.metrics):
        try:
            client.delete_run(ghost.info.run_id)
        except MlflowException as error:
            if not is_permanent(error):  # someone else was faster
                raise
    _complete(client, found[0], description)
    return found[0]


def find_run(client: MlflowClient, experiment: str, identity: str) -> str | None:
    """MLflow's id of the run of this identity, if there is one."""
    found = client.get_experiment_by_name(experiment)
    runs = _runs_of(client, found.experiment_id, identity) if found else []
    return str(runs[0].info.run_id) if runs else None


def change_params(client: MlflowClient, run: Run, params: Mapping[str, str], *, when_ms: int) -> bool:
    """Tell as tags what a later start changed, for MLflow's parameters cannot change: `changed.NAME`: `old -> new at
    TIME`, one after the other. Returns whether something did.
    """
    tags = []
    for name, value in params.items():
        before = run.data.params.get(name)
        told = run.data.tags.get(f"changed.{name}", "")
        now = told.rpartition("-> ")[2].rpartition(" at ")[0] if told else before
        value = _short(value, 1000)
        if before is not None and _short(str(now), 1000) != value:
            text = f"{told}; -> {value}" if told else f"{_short(before, 1000)} -> {value}"
            tags.append(RunTag(f"changed.{name}", f"{text} at {iso(when_ms)}"[-_LONGEST_TAG:]))
    for first in range(0, len(tags), _AT_ONCE):
        client.log_batch(run.info.run_id, tags=tags[first : first + _AT_ONCE])
    return bool(tags)


def set_status(client: MlflowClient, run_id: str, status: str, *, when_ms: int, error: str | None) -> None:
    """Say how it is with a run, unless something later was said: what waited in a spool does not undo it."""
    tags = client.get_run(run_id).data.tags
    if when_ms < int(tags.get(STATUS_TIME_TAG, "0")):
        return
    if status == "RUNNING":
        client.update_run(run_id, status="RUNNING")
        if RESULTS_TAG in tags:  # it will have others
            client.delete_tag(run_id, RESULTS_TAG)
    else:
        client.set_terminated(run_id, status, end_time=when_ms)
    if error:
        client.set_tag(run_id, ERROR_TAG, _short(error, _LONGEST_TAG))
    elif ERROR_TAG in tags:
        client.delete_tag(run_id, ERROR_TAG)
    client.set_tag(run_id, STATUS_TIME_TAG, str(when_ms))


def process_here() -> str:
    """This process, as others on this machine can look for it: machine, process id, time of its start."""
    process = psutil.Process()
    return f"{_machine()} {process.pid} {_started(process)}"


def reap(client: MlflowClient, *, now: float | None = None) -> list[Reaped]:
    """End what is left RUNNING by processes that are dead: as FAILED, at the last sign of life.

    A process of this machine is looked for; of another one, 15 minutes without a sign count as death.
    """
    now = now or time.time()
    experiments = [found.experiment_id for found in every(client.search_experiments)]
    reaped = []
    for run in every(client.search_runs, experiments, "attributes.status = 'RUNNING'"):
        tags = run.data.tags
        if NAME_TAG not in tags or (why := _why_dead(run, now)) is None:
            continue
        if client.get_run(run.info.run_id).info.status != "RUNNING":  # it has ended since the search
            continue
        alive_ms = max(int(tags.get(ALIVE_TAG, "0")), run.info.start_time)
        client.set_terminated(run.info.run_id, "FAILED", end_time=alive_ms)
        client.set_tag(run.info.run_id, ERROR_TAG, why + _REAPED)
        reaped.append(Reaped(run.info.run_id, tags[NAME_TAG], why))
    return reaped


def goes_on(run: Run) -> bool:
    """Whether a run is RUNNING by a process that is alive, as far as one can tell."""
    return run.info.status == "RUNNING" and _why_dead(run, time.time()) is None


def revive(client: MlflowClient, run_id: str) -> None:
    """Say that a run goes on which was taken for dead: its server may have been away longer than it gave signs."""
    run = client.get_run(run_id)
    if run.info.status == "FAILED" and run.data.tags.get(ERROR_TAG, "").endswith(_REAPED):
        client.update_run(run_id, status="RUNNING")
        client.delete_tag(run_id, ERROR_TAG)


def every(search: Callable[..., Any], *what: Any, **how: Any) -> list[Any]:
    """All that a search of MLflow's client finds, which answers a page at a time.

    It ends before the caller changes anything: pages are counted, and what fits no longer would shift the next one.
    """
    page = search(*what, **how)
    found = list(page)
    while page.token:
        page = search(*what, **how, page_token=page.token)
        found += page
    return found


def logged_images(client: MlflowClient, run_id: str) -> Iterator[tuple[str, int, str]]:
    """Key, step and artifact path of each whole picture of a run; MLflow tells the first two by its name alone."""
    for artifact in client.list_artifacts(run_id, "images"):
        key, _, rest = Path(artifact.path).name.partition("+step+")
        if rest.endswith(".png"):
            yield key.replace("~", "/"), int(rest.partition("+")[0]), artifact.path


def ping(uri: str) -> int:
    """How many experiments a tracking backend has.

    Raises:
        TrackingError: it does not answer, or is a damaged database.
    """
    try:
        return len(every(client_of(uri).search_experiments))
    except Exception as error:  # whatever a server or a damaged database can answer
        told = str(error).partition("\n")[0]  # behind it comes the SQL
        raise TrackingError(f"tracking: {uri} does not answer: {told}") from error


def quoted(text: str) -> str:
    """For a filter of MLflow's, which knows no escapes: it cannot hold both kinds of quotes."""
    quote = '"' if "'" in text else "'"
    return f"{quote}{text}{quote}"


def iso(when_ms: int) -> str:
    return datetime.fromtimestamp(when_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _experiment(client: MlflowClient, description: RunDescription) -> str:
    name = description.experiment
    found = client.get_experiment_by_name(name)
    if found is None:
        # A database has no place for artifacts of its own, and MLflow's default is the folder it happens to run in. Not
        # the run's own: runs of other folders come to lie there too.
        file = database_file(client.tracking_uri)
        beside = (file.parent / _ARTIFACTS).as_uri() if file else None
        try:
            return str(client.create_experiment(name, artifact_location=beside))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process made it in between
                raise
            found = client.get_experiment_by_name(name)
    if found.lifecycle_stage != "active":
        raise TrackingError(f"experiment '{name}' is deleted; restore it or choose another --tracking.experiment")
    _refuse_moved(found, database_file(client.tracking_uri))
    return str(found.experiment_id)


def _runs_of(
    client: MlflowClient, experiment_id: str, identity: str, view: ViewType = ViewType.ACTIVE_ONLY
) -> list[Run]:
    """Those that were written to first, of them the oldest: a request that was made again has the same time."""
    found = every(client.search_runs, [experiment_id], f"tags.`{IDENTITY_TAG}` = '{identity}'", run_view_type=view)
    return sorted(found, key=lambda run: (not run.data.params, run.info.start_time, run.info.run_id))


def _refuse_deleted(client: MlflowClient, experiment_id: str, description: RunDescription) -> None:
    """A run that somebody deleted is not silently made anew."""
    deleted = _runs_of(client, experiment_id, description.identity, ViewType.DELETED_ONLY)
    if deleted:
        raise TrackingError(
            f"run '{description.name}' ({deleted[0].info.run_id}) is deleted in MLflow; restore it there, or start "
            "another run with --resume none or --name"
        )


def _complete(client: MlflowClient, run: Run, description: RunDescription) -> None:
    """Log what the run lacks of its description; a process may have died in the middle of doing so."""
    run_id = run.info.run_id
    missing = [Param(k, _short(v, _LONGEST_PARAM)) for k, v in description.params.items() if k not in run.data.params]
    for first in range(0, len(missing), _AT_ONCE):
        client.log_batch(run_id, params=missing[first : first + _AT_ONCE])
    inputs = [] if run.inputs is None else run.inputs.dataset_inputs
    there = {(found.dataset.name, found.dataset.digest) for found in inputs}
    wanted = [_dataset(context, *found) for context, found in description.datasets.items()]
    if new := [one for one in wanted if (one.dataset.name, one.dataset.digest) not in there]:
        client.log_inputs(run_id, new)
    files = {artifact.path for artifact in client.list_artifacts(run_id)}
    for name, text in description.files.items():
        if name not in files:
            client.log_text(run_id, text, name)


def _dataset(context: str, source: str, root_hash: str) -> DatasetInput:
    dataset = Dataset(name=context, digest=root_hash[:_LONGEST_DIGEST], source_type="adaconv", source=source)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def _why_dead(run: Run, now: float) -> str | None:
    machine, _, process = run.data.tags.get(PROCESS_TAG, "").partition(" ")
    pid, _, created = process.partition(" ")
    if machine == _machine() and pid.isdigit():
        try:
            if _started(psutil.Process(int(pid))) == created:
                return None
        except psutil.NoSuchProcess:
            pass
        return f"its process {pid} on this machine is dead"
    silent = now - max(int(run.data.tags.get(ALIVE_TAG, "0")), run.info.start_time) / 1000
    return f"no sign of life for {silent / 60:.0f} minutes" if silent > _SILENT_SECONDS else None


def _started(process: psutil.Process) -> str:
    """Seconds after the boot, which do not change when the clock is set."""
    return f"{process.create_time() - psutil.boot_time():.2f}"


def _machine() -> str:
    """Where process ids mean the same: this boot of this host, and this container of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
        space = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:
        boot = space = "0"
    return f"{socket.gethostname()}/{boot}/{space}"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
