"""Checkpoints to named model versions, aliases with their history, and any name of a model back to a local folder."""

import contextlib
import heapq
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from adaconv import checkpoint, storage
from adaconv.errors import AdaConvError, CheckpointError, TrackingError, UsageError
from adaconv.scratch import scratch_folder
from adaconv.tracking import provenance
from adaconv.tracking.logged_model import DIGEST_TAG, card_of, delete_if_unused, log_model, logged_models
from adaconv.tracking.runs import FAILURES, INITIAL_RUN_TAG, every, find_run, iso, quoted, reader_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RegisteredVersion:
    name: str
    version: str
    alias: str | None
    uri: str
    run_id: str


@dataclass(frozen=True)
class Move:
    """One move of an alias: to which version, from which (None: it was new), by whom, why, and how good that was."""

    version: str
    before: str | None
    by: str
    why: str
    at: str
    metrics: dict[str, float]
    rollback: bool = False


def register(model: str, *, name: str, alias: str | None, reason: str, tracking_uri: str) -> RegisteredVersion:
    """Give a checkpoint's model a version of a name, and an alias to the version.

    A checkpoint that has a version of this name already gets no second one, also where two register it at once; a
    registered version is only renamed.

    Args:
        model: a whole checkpoint, whose `meta.json` names the run; or models:/NAME@ALIAS, models:/NAME/VERSION.
        name: of the registered model.
        alias: moved to the version; None moves none.
        reason: why, kept with the version and in the alias's history.
        tracking_uri: of the server or database that holds the run.

    Raises:
        CheckpointError: the checkpoint is not whole, or was not made by a tracked run.
        UsageError: a version of another name.
        TrackingError: the registry cannot be reached or refuses.
    """
    try:
        client = reader_of(tracking_uri)
        if model.startswith("models:/"):
            version = _version_named(client, model, name)
        else:
            version = _version_of_checkpoint(client, model, name)
        if alias:
            move_alias(client, name, alias, version, why=reason or "registered")
    except FAILURES as error:
        raise TrackingError(f"cannot register {name} at {tracking_uri}: {error}") from error
    uri = f"models:/{name}@{alias}" if alias else f"models:/{name}/{version.version}"
    return RegisteredVersion(name, str(version.version), alias, uri, version.run_id)


def named_by(name: str, alias: str, *, tracking_uri: str) -> str | None:
    """Whom an alias names: models:/NAME/VERSION; None where there is no such model or alias yet.

    Raises:
        TrackingError: the registry cannot be reached.
    """
    try:
        aliases = reader_of(tracking_uri).get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise TrackingError(f"cannot read {name} at {tracking_uri}: {error}") from error
    return f"models:/{name}/{aliases[alias]}" if alias in aliases else None


def promote(
    model: str, *, name: str, alias: str, held_by: str | None, reason: str, tracking_uri: str
) -> RegisteredVersion:
    """Give a model an alias, unless somebody else got it since it was compared with who held it.

    Args:
        model: as in `register`.
        name: of the registered model.
        alias: that it gets.
        held_by: whom the alias named then; None for nobody.
        reason: see `register`.
        tracking_uri: see `register`.

    Raises:
        TrackingError: the alias moved meanwhile, or the registry cannot be reached.
    """
    version = register(model, name=name, alias=None, reason=reason, tracking_uri=tracking_uri)  # it may take minutes
    holder = named_by(name, alias, tracking_uri=tracking_uri)
    if holder != held_by:
        raise TrackingError(
            f"models:/{name}@{alias} is {holder or 'nobody'} now, and was {held_by or 'nobody'} when {model} was "
            "compared with it; run the same command again"
        )
    return register(version.uri, name=name, alias=alias, reason=reason, tracking_uri=tracking_uri)


def note_evaluation(model: str, evaluation: dict[str, Any], page: Path, *, tracking_uri: str) -> None:
    """Keep with a registered version what it got on a protocol, and with its run the page.

    Args:
        model: models:/NAME/VERSION; any other name is noted nowhere.
        evaluation: small; `protocol` names it: the same protocol again takes the place of its earlier one, unless that
            one says what the gate found and this one does not.
        page: report.html.
        tracking_uri: of the registry.

    Raises:
        TrackingError: the registry cannot be reached.
    """
    found = re.fullmatch(r"models:/([^/@]+)/(\d+)", model)
    if found is None:
        return
    try:
        client = reader_of(tracking_uri)
        version, key = client.get_model_version(*found.groups()), f"evaluation.{evaluation['protocol']}"
        if "gate" in json.loads(version.tags.get(key, "{}")) and "gate" not in evaluation:
            return
        client.set_model_version_tag(*found.groups(), key, json.dumps(evaluation))
        client.log_artifact(version.run_id, str(page), f"evaluation/{evaluation['protocol']}")
    except FAILURES as error:
        raise TrackingError(f"cannot note the evaluation of {model} at {tracking_uri}: {error}") from error


def rollback(*, name: str, alias: str, reason: str, tracking_uri: str) -> RegisteredVersion:
    """Move an alias back to where it was before its present version got it; again, one further back.

    Raises:
        TrackingError: there is no such alias, nothing to go back to, or the registry cannot be reached.
    """
    try:
        client = reader_of(tracking_uri)
        now = str(client.get_model_version_by_alias(name, alias).version)
        held = _held(history_of(client, name, alias), now)
        if len(held) == 1:
            raise TrackingError(
                f"models:/{name}@{alias} is version {now}, and nothing says what it was before; name a version: "
                f"pipelines/register.py --model models:/{name}/VERSION --name {name} --alias {alias}"
            )
        version = client.get_model_version(name, held[-2])
        move_alias(client, name, alias, version, why=reason or f"back from version {now}", rollback=True)
    except FAILURES as error:
        raise TrackingError(f"cannot move {name}@{alias} back at {tracking_uri}: {error}") from error
    return RegisteredVersion(name, str(version.version), alias, f"models:/{name}@{alias}", version.run_id)


def _held(moves: Sequence[Move], now: str) -> list[str]:
    """The versions that an alias had, the present one last, without those that it was moved back from."""
    held: list[str] = []
    for move in moves:
        if move.before is not None:
            _go_back(held, move.before)  # from a move that was told and never done, or past one by other means
        if move.rollback:
            _go_back(held, move.version)
        else:
            held.append(move.version)
    _go_back(held, now)
    return held


def _go_back(held: list[str], version: str) -> None:
    while version in held and held[-1] != version:
        held.pop()
    if held[-1:] != [version]:
        held.append(version)


def move_alias(
    client: MlflowClient, name: str, alias: str, version: ModelVersion, *, why: str, rollback: bool = False
) -> None:
    """Point an alias to a version, and say who did, why, and with which metrics: at the version and in the history.

    Each move is a tag of its own, for PostgreSQL keeps 5000 characters of one. It is told before it is done, so that no
    move is without its reason.
    """
    before = client.get_registered_model(name).aliases.get(alias)
    if before is not None and str(before) == str(version.version):
        return
    move = Move(
        version=str(version.version),
        before=None if before is None else str(before),
        by=os.environ.get("MLFLOW_TRACKING_USERNAME") or provenance.user(),
        why=why,
        at=iso(int(time.time() * 1000)),
        metrics={key: float(value) for key, value in json.loads(version.tags.get("metrics", "{}")).items()},
        rollback=rollback,
    )
    number = max(_moves(client, name, alias), default=0) + 1
    text = json.dumps(asdict(move), ensure_ascii=False)
    client.set_registered_model_tag(name, f"alias.{alias}.move.{number:06d}", text)
    told = {"reason": move.why, "by": move.by, "at": move.at, "from": move.before or "none"}
    told["metrics"] = ", ".join(f"{key} {value:.6g}" for key, value in move.metrics.items()) or "none"
    for key, value in told.items():
        client.set_model_version_tag(name, version.version, f"alias.{alias}.{key}", value)
    client.set_registered_model_alias(name, alias, version.version)


def history_of(client: MlflowClient, name: str, alias: str) -> list[Move]:
    """Every move of an alias, oldest first."""
    return [move for _, move in sorted(_moves(client, name, alias).items())]


def _moves(client: MlflowClient, name: str, alias: str) -> dict[int, Move]:
    """By their numbers, from 1."""
    tags = client.get_registered_model(name).tags
    found = {re.fullmatch(rf"alias\.{re.escape(alias)}\.move\.(\d+)", key): text for key, text in tags.items()}
    return {int(key[1]): Move(**json.loads(text)) for key, text in found.items() if key}


@contextlib.contextmanager
def resolved_model(uri: str, *, tracking_uri: str) -> Iterator[tuple[str, Path]]:
    """What a name means now, and for the block a local folder with its `model.safetensors` and `model.json`.

    Args:
        uri: see `exact_model`.
        tracking_uri: where models:/ and runs:/ are looked up.

    Yields:
        what `exact_model` gives, and the local folder.

    Raises:
        UsageError, TrackingError, CheckpointError: see `exact_model`; or the folder holds no whole model.
    """
    uri = exact_model(uri, tracking_uri=tracking_uri)
    if not checkpoint.is_mlflow_uri(uri):
        with checkpoint.fetched(uri) as folder:
            yield uri, folder
        return
    with scratch_folder("model") as target:
        try:
            mlflow.artifacts.download_artifacts(uri, dst_path=str(target), tracking_uri=tracking_uri)
        except FAILURES as error:
            raise _unresolved(uri, tracking_uri, error) from error
        found = sorted(target.rglob("model.safetensors"))
        if not found:
            why = "it was not registered by pipelines/register.py" if any(target.iterdir()) else "its files are gone"
            raise CheckpointError(f"{uri} holds no model.safetensors: {why}")
        yield uri, found[0].parent


def exact_model(uri: str, *, tracking_uri: str) -> str:
    """What a model's name means now: of an alias its version, of a run or a folder of runs the newest checkpoint.

    Args:
        uri: models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/NAME, or the folder of a checkpoint, a run or runs
            (local or s3://).
        tracking_uri: where models:/ is looked up.

    Raises:
        UsageError: the name is not one of these.
        TrackingError: there is no such model, version or alias, or the registry cannot be reached.
        CheckpointError: there is no checkpoint.
    """
    if not checkpoint.is_mlflow_uri(uri):
        return find_checkpoint(uri)
    if re.fullmatch("models:/[^/@]+", uri):  # to MLflow a model that has no name, by its id
        raise UsageError(f"expected {uri}@ALIAS or {uri}/VERSION, found {uri}")
    try:
        client = reader_of(tracking_uri)
        if by_alias := re.fullmatch(r"models:/([^/@]+)@([^/]+)", uri):
            version = client.get_model_version_by_alias(*by_alias.groups())
            return f"models:/{version.name}/{version.version}"
        if by_version := re.fullmatch(r"models:/([^/@]+)/([^/]+)", uri):
            client.get_model_version(*by_version.groups())
    except FAILURES as error:
        raise _unresolved(uri, tracking_uri, error) from error
    return uri


def _unresolved(uri: str, tracking_uri: str, error: Exception) -> TrackingError:
    return TrackingError(f"{uri} at {tracking_uri}: {error}; pipelines/register.py makes model versions")


def source_of(model: str) -> tuple[str, str | None]:
    """A model's name as it is, of a folder its newest checkpoint; and where that one's run is tracked, if it says so.

    Raises:
        CheckpointError: there is none.
    """
    if checkpoint.is_mlflow_uri(model):
        return model, None
    uri = find_checkpoint(model)
    return uri, checkpoint.meta_of(uri).get("tracking_uri")


def run_of(model: str, *, tracking_uri: str) -> str | None:
    """Id of the run that made a model, named as `resolved_model` yields it; None where that is not known.

    Raises:
        TrackingError: the registry cannot be reached.
    """
    kind, _, name = model.partition(":/")
    if kind != "models":
        return name.partition("/")[0] if kind == "runs" else checkpoint.meta_of(model).get("run_id")
    try:
        return str(reader_of(tracking_uri).get_model_version(*name.split("/")).run_id)
    except FAILURES as error:
        raise TrackingError(f"{model} at {tracking_uri}: {error}") from error


def trained_on(model: str, *, tracking_uri: str) -> dict[str, list[str]]:
    """What runs say that a model was trained on: `content` and `style` to ROOT@VERSION; empty where none tells.

    Of one that began with another's weights, what that one was trained on as well.

    Args:
        model: as in `run_of`.
        tracking_uri: where its run is looked up.
    """
    found: dict[str, list[str]] = {}
    with contextlib.suppress(MlflowException, AdaConvError, OSError):
        client, run_id = reader_of(tracking_uri), run_of(model, tracking_uri=tracking_uri)
        asked = set()
        while run_id and run_id not in asked:
            asked.add(run_id)
            run = client.get_run(run_id)
            for one in run.inputs.dataset_inputs if run.inputs else []:
                found.setdefault(one.dataset.name, []).append(one.dataset.source)
            run_id = run.data.tags.get(INITIAL_RUN_TAG)
    return found


def find_checkpoint(path: str) -> str:
    """A checkpoint folder as it is; of a run or a folder of runs, the newest checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    if storage.exists(storage.join(path, "meta.json")):
        return path

    def of_run(run: str) -> tuple[float, list[str]]:
        return by_age(list(checkpoint.steps_in(storage.join(run, "checkpoints")).values()))

    def by_age(uris: list[str]) -> tuple[float, list[str]]:
        return (-_time_of(uris[-1]) if uris else math.inf), uris

    # Only what is to be used is fetched and compared: of a thousand runs they are 700 GB.
    runs = list(storage.few_at_once(of_run, [path, *storage.list_directories(path)], where=path))
    heapq.heapify(runs)
    while runs:
        _, uris = heapq.heappop(runs)
        if uris and checkpoint.is_whole(uri := uris.pop()):
            return uri
        if uris:
            heapq.heappush(runs, by_age(uris))
    raise CheckpointError(
        f"expected a checkpoint, a run or a folder of runs at {path}, found no whole checkpoint below it; "
        "pipelines/train.py writes them"
    )


def _time_of(checkpoint_uri: str) -> float:
    """When it was written; of a damaged one that it comes first, to be passed over."""
    try:
        return float(checkpoint.meta_of(checkpoint_uri)["time"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return math.inf


def _version_named(client: MlflowClient, uri: str, name: str) -> ModelVersion:
    found = re.fullmatch(r"models:/([^/@]+)(?:@([^/]+)|/(\d+))", uri)
    if found is None or found[1] != name:
        raise UsageError(f"expected models:/{name}@ALIAS or models:/{name}/VERSION, found {uri}")
    return client.get_model_version_by_alias(name, found[2]) if found[2] else client.get_model_version(name, found[3])


def _run_of_checkpoint(client: MlflowClient, meta: Mapping[str, Any]) -> Run | None:
    """By its id; where the server knows none of that, for it was told of the run later, by its identity."""
    try:
        if meta.get("run_id"):
            return client.get_run(meta["run_id"])
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    found = find_run(client, meta.get("experiment", ""), meta.get("identity", ""))
    return client.get_run(found) if found else None


def _version_of_checkpoint(client: MlflowClient, checkpoint_uri: str, name: str) -> ModelVersion:
    meta = checkpoint.meta_of(checkpoint_uri)
    run = _run_of_checkpoint(client, meta)
    if run is None:
        raise CheckpointError(
            f"{checkpoint_uri} names no tracking run that is known here; register a checkpoint of pipelines/train.py, "
            "after pipelines/runs.py sync if its server was down"
        )
    run_id = run.info.run_id
    with checkpoint.fetched(checkpoint_uri) as folder:
        logged = log_model(client, run, folder, checkpoint_uri=checkpoint_uri)
    first = _first_version_of(client, run, logged, name)
    if first is None:
        with contextlib.suppress(MlflowException):  # it is there already
            client.create_registered_model(
                name, description="AdaConv: a content drawn in a style, pictures in and out."
            )
        made = client.create_model_version(
            name,
            logged.artifact_location,
            run_id=run_id,
            model_id=logged.model_id,
            # The registry forgets which logged model a version is; its params are the metrics at its step.
            tags={"checkpoint": checkpoint_uri, "step": str(meta["step"]), "metrics": json.dumps(logged.params)},
            description=card_of(client, logged),
        )
        # Two may come to this at once, and nothing in MLflow makes one wait: all keep the version of the lowest number.
        first = _first_version_of(client, run, logged, name) or made
        if first.version != made.version:
            client.delete_model_version(name, made.version)
    if first.source != logged.artifact_location:
        delete_if_unused(client, run, logged)
    return first


def _first_version_of(client: MlflowClient, run: Run, logged: LoggedModel, name: str) -> ModelVersion | None:
    """The version of a name that has a logged model's weights."""
    digest = logged.tags[DIGEST_TAG]
    same = {one.artifact_location for one in logged_models(client, run) if one.tags.get(DIGEST_TAG) == digest}
    versions = every(client.search_model_versions, f"name = {quoted(name)} and run_id = '{run.info.run_id}'")
    return min((one for one in versions if one.source in same), key=lambda one: int(one.version), default=None)
