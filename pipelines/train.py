"""Train on two dataset versions, contents and styles: checkpoints and one MLflow run.

    python pipelines/train.py --config conf/train/smoke.yaml --content data/photos --style data/paintings --output runs

The same command again takes up a run that was broken off, from its newest checkpoint, exactly. SIGTERM and Ctrl-C ask
for one before the end; a second Ctrl-C ends the run at once.

    python pipelines/train.py … --init-from models:/adaconv@champion --train.learning-rate 1e-5

begins a new run with the weights of a model: on other data, or with another learning rate or loss.
"""

import hashlib
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconv import cli
from adaconv.config.load import to_yaml
from adaconv.config.train import TrainConfig

if TYPE_CHECKING:
    from adaconv.data.manifest import DatasetVersion
    from adaconv.training.start import Initial

log = logging.getLogger(__name__)


def plan(config: TrainConfig) -> str:
    from adaconv import checkpoint, storage
    from adaconv.data.manifest import open_version
    from adaconv.model.encoder_weights import is_here
    from adaconv.training.plan import describe
    from adaconv.training.probe import given_squares

    config = _absolute(config)
    _require(config)
    content, style = open_version(config.content), open_version(config.style)
    given_squares(config)
    name = _run_name(config, content.root_hash, style.root_hash)
    there = checkpoint.steps_in(storage.join(config.output, name, "checkpoints")) if config.resume != "none" else {}
    begun = _begun(config, content, style, there[max(there)] if there else None)
    steps, batch = config.train.steps, config.train.global_batch_size
    rows = {name: sum(s.rows for s in version.shards) for name, version in (("content", content), ("style", style))}
    epochs = ", ".join(f"{steps * batch / count:.1f} epochs over {count} {name}s" for name, count in rows.items())
    initial = f"{_told(_initial(config, download=False).origin)}\n" if config.init_from else ""
    if initial and not is_here(config.encoder.weights):
        initial += f"its encoder is compared with {config.encoder.weights} by the run, for that is not here yet\n"
    return (
        f"run {name}: {steps} steps x {batch} pairs on "
        f"{config.scaling.most_workers} ranks: {epochs}\n"
        f"{begun}{initial}checkpoints every {config.checkpoint.every_steps} steps below {config.output}\n"
        + describe(config, content, style, ranks=(1, 2, 4, 8, 16, 32, 64))
    )


def execute(config: TrainConfig) -> dict[str, Any]:
    from adaconv import checkpoint, storage
    from adaconv.data.manifest import open_version
    from adaconv.errors import Interrupted
    from adaconv.orchestration.cluster import connect
    from adaconv.tracking.mlflow_tracker import close_run, open_run
    from adaconv.tracking.results import hand_over, keep_results, lacks_its_end
    from adaconv.tracking.runs import identity_of, local_folder
    from adaconv.tracking.tracker import flatten
    from adaconv.training.plan import describe
    from adaconv.training.probe import given_squares
    from adaconv.training.start import publish_initial

    config = _absolute(config)
    _require(config)
    content, style = open_version(config.content), open_version(config.style)
    given_squares(config)  # what is wrong with them is told here, not by the first rank
    name = _run_name(config, content.root_hash, style.root_hash)
    if config.resume == "none":
        name = _unused(config.output, name)
    run_folder = storage.join(config.output, name)
    beside = local_folder(config.output)
    tracking_uri = _tracking_uri(config)
    result: dict[str, Any] = {"run": run_folder, "name": name, "tracking_uri": tracking_uri}

    checkpoints = storage.join(run_folder, "checkpoints")
    whole = checkpoint.newest(checkpoints)
    before = checkpoint.meta_of(whole) if whole else {}
    done = before.get("step", 0)
    origin, initial = _origin(config, checkpoints, before)
    begun = _begun(config, content, style, whole)
    if done < config.train.steps:
        for line in (begun + describe(config, content, style, ranks=())).splitlines():
            log.info(line)
    identity = identity_of(run_folder)  # the first that is written, when nothing is refused any more
    local = Path(run_folder) if storage.is_local(run_folder) else beside / f"{name}-{identity[:8]}"
    if done >= config.train.steps:
        log.info("%s has its %d steps already; nothing to train", run_folder, done)
        run_id = before.get("run_id")
        result |= {"run_id": run_id, "step": done, "checkpoint": whole, "finished": True}
        waits = hand_over(local / "spool", uri=tracking_uri, checkpoints=checkpoints)
        if waits or not lacks_its_end(tracking_uri, run_id, config.tracking.experiment, identity):
            return result
    pinned = {"content": f"{content.root}@{content.version}", "style": f"{style.root}@{style.version}"}
    config = config.model_copy(update=pinned)
    tracker = open_run(
        uri=tracking_uri,
        experiment=config.tracking.experiment,
        identity=identity,
        name=name,
        params=config.model_dump(mode="json", exclude={"output", "resume", "name", "tracking"}),
        tags={
            "adaconv.folder": run_folder,
            "adaconv.content_hash": content.root_hash,
            "adaconv.style_hash": style.root_hash,
            **flatten(origin, "adaconv."),
        },
        datasets={"content": (pinned["content"], content.root_hash), "style": (pinned["style"], style.root_hash)},
        config_yaml=to_yaml(config),
        spool_directory=local / "spool",
    )
    log.info("run %s (MLflow %s at %s)", run_folder, tracker.run_id, tracking_uri)
    if not result.get("finished"):  # else only its end is missing
        meta = {**tracker.reference(), **origin}
        try:
            # Not before: a run that another process trains keeps what that one was told.
            storage.publish_bytes(storage.join(run_folder, "config.yaml"), to_yaml(config).encode())
            if initial:
                publish_initial(initial, config, content=content, style=style, checkpoints=checkpoints, meta=meta)
                initial = None  # all weights, in the driver's memory
            with connect():
                from adaconv.orchestration.train_job import run_train_job

                result |= run_train_job(config, run_folder=run_folder, tracker=tracker, meta=meta)
        except (KeyboardInterrupt, Interrupted):
            close_run(tracker, "KILLED")
            raise
        except BaseException as error:
            close_run(tracker, "FAILED", error=f"{type(error).__name__}: {error}")
            raise
    if not result["finished"]:
        close_run(tracker, "KILLED")
        raise Interrupted(f"stopped at step {result['step']} with a checkpoint; the same command goes on from there")
    if close_run(tracker, "FINISHED"):
        result |= keep_results(tracker, checkpoints=checkpoints)
    return {**result, "run_id": tracker.run_id}


def _end(_signal: int, _frame: object) -> None:
    from adaconv.errors import Interrupted

    raise Interrupted("stopped; the same command goes on")


def _absolute(config: TrainConfig) -> TrainConfig:
    """Paths as ranks can read them, whose working directories are others."""
    from adaconv import checkpoint, storage

    changed: dict[str, Any] = {name: storage.absolute(getattr(config, name)) for name in ("content", "style", "output")}
    if _starts_from(config):
        changed["resume"] = storage.absolute(config.resume)
    if config.init_from and not checkpoint.is_mlflow_uri(config.init_from):
        changed["init_from"] = storage.absolute(config.init_from)
    if Path(config.encoder.weights).is_file():  # not ~/…, which each rank expands: it is part of what the run is
        changed["encoder"] = config.encoder.model_copy(update={"weights": storage.absolute(config.encoder.weights)})
    if config.data.cache_dir is not None:
        changed["data"] = config.data.model_copy(update={"cache_dir": storage.absolute(config.data.cache_dir)})
    pictures = {"contents_from": config.tracking.contents_from, "styles_from": config.tracking.styles_from}
    given = {name: storage.absolute(folder) for name, folder in pictures.items() if folder is not None}
    changed["tracking"] = config.tracking.model_copy(update=given)
    if config.train.ledger is not None:
        changed["train"] = config.train.model_copy(update={"ledger": storage.absolute(config.train.ledger)})
    return config.model_copy(update=changed)


def _tracking_uri(config: TrainConfig) -> str:
    from adaconv.tracking.runs import default_uri, local_folder

    return default_uri(config.tracking.uri, local_folder(config.output))


def _origin(
    config: TrainConfig, checkpoints: str, newest: Mapping[str, Any]
) -> "tuple[dict[str, Any], Initial | None]":
    """Whose weights a run begins or began with, for its books; and these weights, where it has none of its own yet.

    Args:
        config: of the run.
        checkpoints: folder of the run's.
        newest: the meta of its newest whole one; empty where there is none.

    Raises:
        UsageError: it began otherwise than it is asked to.
    """
    from adaconv import checkpoint
    from adaconv.errors import UsageError

    there = list(checkpoint.steps_in(checkpoints))
    origin = {key: newest[key] for key in ("started_from", "init_from") if key in newest}
    initial = None
    if _starts_from(config):
        if there and origin.get("started_from") != config.resume:
            raise UsageError(
                f"--resume {config.resume}: expected a run that has no checkpoints yet, or started from this one; "
                f"found some in {checkpoints}. Give another --name or none, or leave out --resume to go on from there"
            )
        origin = {"started_from": config.resume}
    elif config.init_from and not newest and there in ([], [0]):
        initial = _initial(config)
        origin = {"init_from": initial.origin}
    if "init_from" in origin:
        log.info("%s", _told(origin["init_from"]))
    return origin, initial


def _begun(config: TrainConfig, content: "DatasetVersion", style: "DatasetVersion", newest: str | None) -> str:
    """Where a run goes on, or which other one may be meant, as a line; empty where there is nothing to say.

    Args:
        config: of the run.
        content: dataset version.
        style: dataset version.
        newest: the run's own newest checkpoint.

    Raises:
        CheckpointError: it would go on from a checkpoint of another run.
    """
    from adaconv import checkpoint
    from adaconv.training.start import books_of, nearly_this_run, refuse_other_run

    books = books_of(config, content, style)
    if uri := newest or (config.resume if _starts_from(config) else None):
        refuse_other_run(uri, checkpoint.data_of(uri), books)
        return f"it goes on from {uri}\n"
    near = "" if config.resume == "none" or config.init_from else nearly_this_run(config.output, books)
    return near and f"{near}\n"


def _require(config: TrainConfig) -> None:
    """Refuse here what ranks would, once the run is tracked."""
    from adaconv import checkpoint
    from adaconv.model.encoder_weights import require_source

    if _starts_from(config):
        checkpoint.require(config.resume)
    require_source(config.encoder.weights, file_here=not os.environ.get("RAY_ADDRESS"))


def _initial(config: TrainConfig, *, download: bool = True) -> "Initial":
    """The model that `init_from` names now."""
    from adaconv.tracking.registry import resolved_model, run_of, source_of
    from adaconv.training.start import load_initial

    assert config.init_from is not None
    where = _tracking_uri(config)
    with resolved_model(source_of(config.init_from)[0], tracking_uri=where) as (uri, folder):
        return load_initial(config, folder, uri=uri, run_id=run_of(uri, tracking_uri=where), download=download)


def _told(origin: Mapping[str, Any]) -> str:
    return "weights of step 0: " + ", ".join(f"{key} {value}" for key, value in origin.items())


def _starts_from(config: TrainConfig) -> bool:
    """Whether `resume` names a checkpoint."""
    return config.resume not in ("auto", "none")


def _run_name(config: TrainConfig, *root_hashes: str) -> str:
    """A run is what determines its weights: another learning rate is another run, another number of ranks is not.

    So is a start from a checkpoint, with what is skipped from there on: the steps after it are done anew, and those of
    the run that they were taken from stand.
    """
    if config.name:
        return config.name
    start = [config.resume, *config.data.skip_batches] if _starts_from(config) else []
    identity = json.dumps([config.identity(), *root_hashes, *start], sort_keys=True)
    return f"{config.model.architecture}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def _unused(output: str, name: str) -> str:
    from adaconv import storage

    taken = set(map(storage.name_of, storage.list_directories(output)))
    names = [name, *(f"{name}-{number}" for number in range(2, len(taken) + 3))]
    return next(candidate for candidate in names if candidate not in taken)


def main(argv: Sequence[str] | None = None) -> int:
    before = signal.signal(signal.SIGTERM, _end)  # until the ranks are there, and can be asked for a checkpoint
    try:
        return cli.run(TrainConfig, argv, prog="pipelines/train.py", doc=__doc__, plan=plan, execute=execute)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
