"""What a run is, what it may go on from, and how a new one begins with the weights of another.

Such weights are a checkpoint of step 0 that the driver makes. So ranks find them on every node, where they find all
checkpoints, and a start after a kill has the same ones, wherever the name that they came by points by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adaconv import checkpoint, storage
from adaconv.checkpoint import ModelInfo
from adaconv.data.order import batch_of_step
from adaconv.errors import CheckpointError, ConfigError
from adaconv.model.encoder import VGGEncoder
from adaconv.model.encoder_weights import is_here, load_encoder, normalisation_of
from adaconv.model.network import StyleTransferNet
from adaconv.training.state import make_state

if TYPE_CHECKING:
    from adaconv.config.train import TrainConfig
    from adaconv.data.manifest import DatasetVersion

_LOOKED_AT = 100  # folders beside a run's


@dataclass(frozen=True)
class Initial:
    """Weights that a new run begins with; `origin` says whose they are, for the books."""

    network: StyleTransferNet
    info: ModelInfo
    origin: Mapping[str, Any]


def load_initial(config: TrainConfig, folder: Path, *, uri: str, run_id: str | None, download: bool = True) -> Initial:
    """The model in a local folder, if it is the configured network on the configured encoder.

    Args:
        config: of the new run.
        folder: that the model was fetched to.
        uri: that it was named by.
        run_id: of the run that made it.
        download: whether the encoder's weights may be downloaded to compare it; else it is where they are here.

    Raises:
        ConfigError: it is another one; names all that differs.
        CheckpointError: it is no whole model.
        WeightsError: the configured encoder's weights cannot be had.
    """
    network, info = checkpoint.load_network(folder)
    found = {"model": info.settings["model"], "encoder": {"widths": info.settings["encoder_widths"]}}
    wanted = {"model": config.model.model_dump(mode="json"), "encoder": {"widths": list(config.encoder.widths)}}
    different = [f"{name} (expected {b!r}, found {a!r})" for name, a, b in _differing(found, wanted)]
    if different:
        raise ConfigError(
            f"--init-from {uri}: expected the network that is configured, found another: {', '.join(different)}. Give "
            "the settings that were found, or another model"
        )
    if download or is_here(config.encoder.weights):
        _refuse_another_encoder(config, network.encoder, info, uri)
    origin = {"uri": uri, "step": info.step, "digest": info.digest, **({"run_id": run_id} if run_id else {})}
    return Initial(network, info, origin)


def publish_initial(
    initial: Initial,
    config: TrainConfig,
    *,
    content: DatasetVersion,
    style: DatasetVersion,
    checkpoints: str,
    meta: Mapping[str, Any],
) -> str:
    """The checkpoint of step 0 with these weights and a fresh optimizer; returns its URI."""
    state = make_state(initial.network, config.train, device=torch.device("cpu"))
    return checkpoint.save(
        checkpoints,
        step=0,
        weights=state.inference_weights(),
        settings=initial.info.settings,
        encoder_fingerprint=initial.info.encoder_fingerprint,
        trainer=state.trainer_dict(),
        data={**books_of(config, content, style), "samples_seen": 0},
        meta=meta,
    )


def books_of(config: TrainConfig, content: DatasetVersion, style: DatasetVersion) -> dict[str, Any]:
    """What a run is; every checkpoint keeps it as `data.json`."""
    return {
        "content": content.root_hash,
        "style": style.root_hash,
        "identity": config.identity(),
        "skipped": config.data.skipped,
    }


def refuse_other_run(uri: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """A run goes on only as what it was: the same datasets, network, losses, order and schedule.

    Args:
        uri: of the checkpoint that it is to go on from.
        saved: its books, `books_of` then.
        now: `books_of` the run.

    Raises:
        CheckpointError: names all that differs; or the books are none of a training's.
    """
    try:
        different = differences(saved, now)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{uri}: data.json is not what pipelines/train.py writes: {error!r}") from error
    if different:
        raise CheckpointError(
            f"{uri} belongs to another run; different: {', '.join(different)}. Give the same settings, or "
            "--resume none for a new run; --init-from begins one with these weights"
        )


def nearly_this_run(output: str, now: Mapping[str, Any]) -> str:
    """What to say of a run below a folder that differs from one that is to begin in one thing: it may be meant.

    Args:
        output: the folder of runs; of a hundred at most, for each takes a listing.
        now: `books_of` the run.
    """

    def told(run: str) -> str:
        steps = checkpoint.steps_in(storage.join(run, "checkpoints"))
        try:
            different = differences(checkpoint.data_of(steps[max(steps)]), now) if steps else []
        except (CheckpointError, KeyError, TypeError):  # damaged, or of another release
            return ""
        if len(different) != 1:
            return ""
        return (
            f"{run} is another run, at step {max(steps)}; different: {different[0]}. This one begins at step 0; the "
            "command that the other one was begun with goes on with it, --init-from begins with its weights"
        )

    runs = storage.list_directories(output)[:_LOOKED_AT]
    return next(filter(None, storage.few_at_once(told, runs, where=output)), "")


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What the books of a run have otherwise than those of another, each with both values."""
    different = [
        f"{name} dataset ({saved[name][:16]} then, {now[name][:16]} now)"
        for name in ("content", "style")
        if saved[name] != now[name]
    ]
    different += [
        f"{name} ({before!r} then, {value!r} now)"
        for name, before, value in _differing(saved["identity"], now["identity"])
    ]
    steps = saved["samples_seen"] // now["identity"]["train"]["global_batch_size"]
    passed, given = (_passed(books.get("skipped", []), steps) for books in (saved, now))
    if passed != given:
        different.append(f"data.skip_batches ({passed or 'none'} then, {given or 'none'} now, before step {steps})")
    return different


def _passed(ranges: Sequence[Sequence[int]], steps: int) -> list[str]:
    """The ranges of batches that the first steps left out, as the configuration has them."""
    pairs = [(first, end) for first, end in ranges]
    last = batch_of_step(steps - 1, pairs) if steps else -1
    return [f"{first}:{end}" for first, end in pairs if first <= last]


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any, Any]]:
    """What `found` has otherwise than `wanted`, or not at all: dotted name and both values."""
    for key, value in wanted.items():
        other = found.get(key)
        if isinstance(value, Mapping):
            yield from _differing(other or {}, value, f"{above}{key}.")
        elif other != value:
            yield above + key, other, value


def _refuse_another_encoder(config: TrainConfig, encoder: VGGEncoder, info: ModelInfo, uri: str) -> None:
    """The encoder comes along as it is, because the network has learnt to read its features. Calibrated anew on other
    datasets it would have other scales, so it is held against the weights that it was made of.
    """
    wanted = config.encoder
    found = normalisation_of(encoder, load_encoder(wanted.weights, widths=wanted.widths))
    if found != wanted.normalise:
        raise ConfigError(
            f"--init-from {uri}: expected an encoder of encoder.weights {wanted.weights} with encoder.normalise "
            f"{wanted.normalise}, found one "
            + (f"with encoder.normalise {found}" if found else "of other weights")
            + f" (fingerprint {info.encoder_fingerprint[:12]}). Give the settings that it was trained with"
        )
