"""A training run, top to bottom: resume, batch, step, report, checkpoint, stop.

Plain torch: the same function runs in a test, in one process, and on every rank of a cluster. It knows no tracking
backend and no cluster; it is handed a tracker and a control.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from adaconv import checkpoint
from adaconv.data.loader import Batch, Geometry, PairDataset, make_loader, prefetching
from adaconv.data.shard_cache import ShardCache, default_cache_dir
from adaconv.errors import CheckpointError
from adaconv.images import to_float
from adaconv.model.encoder_weights import fingerprint, load_encoder, normalise_encoder
from adaconv.model.network import build_network
from adaconv.progress import Due, duration
from adaconv.tracking.tracker import GRID_KEY
from adaconv.training import distributed
from adaconv.training.probe import Look, collapse, probe_of
from adaconv.training.saving import CheckpointWriter
from adaconv.training.start import books_of, refuse_other_run
from adaconv.training.state import TrainState, make_state
from adaconv.training.step import train_step

if TYPE_CHECKING:
    from adaconv.config.train import TrainConfig
    from adaconv.data.manifest import DatasetVersion
    from adaconv.tracking.tracker import Tracker

log = logging.getLogger(__name__)

_STARVING_SHARE, _STARVING_WINDOW_SECONDS, _STARVING_SILENCE_SECONDS = 0.1, 60.0, 600.0
_CALIBRATION_BATCHES, _CALIBRATION_PAIRS = 8, 8  # whatever the batch, so that the encoder does not depend on it


Word = Literal["go", "checkpoint", "stop"]
_WORDS: tuple[Word, ...] = ("go", "checkpoint", "stop")  # of several ranks' words the last one here counts


class Control(Protocol):
    """What the outside says to a run, and hears of it."""

    def word(self) -> Word:
        """`stop`: checkpoint and end; `checkpoint`: checkpoint and go on, for a node is about to go.

        Asked at every step; must not wait. What one rank is told counts for all.
        """

    def say(self, line: str) -> None:
        """One line for whoever watches."""

    def published(self, step: int) -> None:
        """The checkpoint of this step is whole and where it belongs."""

    def not_published(self) -> None:
        """The last checkpoint could not be written; the next one that is asked for is waited for."""


class NoControl:
    def word(self) -> Word:
        return "go"

    def say(self, line: str) -> None:
        log.info(line)

    def published(self, step: int) -> None:
        pass

    def not_published(self) -> None:
        pass


@dataclass(frozen=True)
class TrainResult:
    """`finished` is False where the run was asked to stop before its last step."""

    step: int
    checkpoint: str
    finished: bool
    losses: dict[str, float]


def train(
    config: TrainConfig,
    *,
    content: DatasetVersion,
    style: DatasetVersion,
    checkpoints: str,
    device: torch.device,
    tracker: Tracker,
    control: Control | None = None,
    start_from: str | None = None,
    meta: dict[str, Any] | None = None,
) -> TrainResult:
    """Train to the last step, from the newest checkpoint there is.

    Args:
        config: of the run.
        content: dataset version of contents.
        style: dataset version of styles.
        checkpoints: folder (local or s3://) that checkpoints go to, and are resumed from.
        device: of this rank.
        tracker: is told by the first rank alone.
        control: says when to stop; None never does.
        start_from: a checkpoint to start from where `checkpoints` has none yet.
        meta: kept with every checkpoint, such as the tracking run's id.

    Raises:
        NonFiniteError: a loss or gradient is not finite.
        CheckpointError: the checkpoint belongs to another configuration or other datasets, or `start_from` has all the
            steps already.
    """
    control = control or NoControl()
    first_rank = distributed.rank() == 0
    began = time.perf_counter()
    data = books_of(config, content, style)
    state, encoder_fingerprint = _resume_or_start(config, content, style, checkpoints, device, start_from, data)
    first_step = state.step
    if first_rank and first_step and (resumed := checkpoint.steps_in(checkpoints).get(first_step)):
        tracker.checkpoint(resumed, step=first_step)  # a rank that is killed may publish one and tell nobody
    writer = CheckpointWriter(
        checkpoints,
        settings={"model": config.model.model_dump(mode="json"), "encoder_widths": list(config.encoder.widths)},
        encoder_fingerprint=encoder_fingerprint,
        keep_last=config.checkpoint.keep_last,
        keep_best=config.checkpoint.keep_best,
        first_step=first_step,
        tell=control.say,
    )
    dataset = _dataset(config, content, style)
    batches = make_loader(
        dataset,
        first_step=first_step,
        steps=config.train.steps,
        workers=config.data.loader_workers,
        prefetch_batches=config.data.prefetch_batches,
        pin_memory=device.type == "cuda",
        timeout_seconds=config.data.timeout_seconds,
    )
    watch = _Watch(config, content, style, dataset, state, tracker, control) if first_rank else None
    if watch and first_step == 0:
        watch.look()
    report, hunger, line_is_due = _Report(config, first_step), _Hunger(config), Due()
    word: Word = "go"
    with (
        prefetching(dataset, ahead=config.data.prefetch_shards) as shards,
        _ledger(config) as note,
        _ended(writer, tracker, control),
    ):
        while state.step < config.train.steps and word != "stop":
            shards.follow(state.step)
            waited_from = time.perf_counter()
            batch = next(batches)
            wait_seconds = time.perf_counter() - waited_from
            if state.step == first_step and first_rank:
                control.say(f"first batch of step {first_step} after {time.perf_counter() - began:.1f} s")
            note(batch)
            result = train_step(state, batch, optim=config.train, loss=config.loss)
            report.add(result.losses, result.learning_rate, result.gradient_norm, wait_seconds)
            if first_rank and (trouble := hunger.add(wait_seconds)):
                control.say(f"WARNING step {state.step}: {trouble}")

            last = state.step == config.train.steps
            word = _WORDS[distributed.largest(_WORDS.index(control.word()), device)]
            if state.step % config.train.log_every_steps == 0 or last:
                metrics = report.metrics()  # a collective: every rank takes part
                if first_rank:
                    tracker.metrics(metrics, step=state.step)
                    if line_is_due() or last or word == "stop":
                        control.say(report.line(state.step, metrics))
            if watch and (state.step % config.tracking.samples_every_steps == 0 or last):
                watch.look()
            if watch and (state.step % config.checkpoint.every_steps == 0 or last or word != "go"):
                state_meta = {**(meta or {}), "metrics": watch.metrics()}
                samples_seen = state.step * config.train.global_batch_size
                writer.save(state, data={**data, "samples_seen": samples_seen}, meta=state_meta)
            _tell_published(writer, tracker, control)
    distributed.barrier(device)  # nobody ends before the last one is published
    where = checkpoint.steps_in(checkpoints).get(state.step, "")
    return TrainResult(state.step, where, state.step >= config.train.steps, report.last)


def _tell_published(writer: CheckpointWriter, tracker: Tracker, control: Control) -> None:
    for step, uri in writer.take_published():
        tracker.checkpoint(uri, step=step)
        control.published(step)
    if writer.has_failed:
        control.not_published()


@contextlib.contextmanager
def _ended(writer: CheckpointWriter, tracker: Tracker, control: Control) -> Iterator[None]:
    """What is being written is published, and told, before the block is left, in whatever way it is."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            writer.wait()
        with contextlib.suppress(Exception):
            _tell_published(writer, tracker, control)
        raise
    writer.wait()
    _tell_published(writer, tracker, control)


@contextlib.contextmanager
def _ledger(config: TrainConfig) -> Iterator[Callable[[Batch], None]]:
    """Notes each step's keys of this rank, a line of JSON a step, before the step is done."""
    if config.train.ledger is None:
        yield lambda batch: None
        return
    folder = Path(config.train.ledger)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{time.time():.6f}-{os.getpid()}-rank-{distributed.rank()}-of-{distributed.num_ranks()}.jsonl"
    with (folder / name).open("w", buffering=1, encoding="utf-8") as file:  # a line that was written is there

        def note(batch: Batch) -> None:
            line = {"step": batch.step, "content": batch.content_keys, "style": batch.style_keys}
            file.write(json.dumps({"rank": distributed.rank(), **line}) + "\n")

        yield note


class _Watch:
    """The first rank's looks at the probe: grids and metrics to the tracker, a warning where the network collapses."""

    def __init__(
        self,
        config: TrainConfig,
        content: DatasetVersion,
        style: DatasetVersion,
        dataset: PairDataset,
        state: TrainState,
        tracker: Tracker,
        control: Control,
    ) -> None:
        self._config, self._state, self._tracker, self._control = config, state, tracker, control
        self._probe = probe_of(config, content, style, cache=dataset.cache)
        self._seen: tuple[int, Look] | None = None

    def look(self) -> None:
        step, look = self._state.step, self._look()
        self._tracker.image(GRID_KEY, look.grid, step=step)
        self._tracker.metrics(look.metrics, step=step)
        trouble = collapse(look.metrics) if step else None
        if trouble:
            self._control.say(f"WARNING step {step}: {trouble}")

    def metrics(self) -> dict[str, float]:
        """Of the present step."""
        return self._look().metrics

    def _look(self) -> Look:
        if self._seen is None or self._seen[0] != self._state.step:
            with self._state.averaged() as network:
                self._seen = (self._state.step, self._probe.look(network, self._config.loss))
        return self._seen[1]


class _Hunger:
    """Looks a minute at a time whether steps wait for data. Not at the first one, in which workers start and caches
    fill; what it says it repeats after ten minutes at the soonest.
    """

    def __init__(self, config: TrainConfig, clock: Callable[[], float] = time.perf_counter) -> None:
        self._config, self._clock = config, clock
        self._since, self._wait_seconds = clock(), 0.0
        self._silent_until = self._since + _STARVING_WINDOW_SECONDS

    def add(self, wait_seconds: float) -> str | None:
        """After each step; the trouble, where there is something to say."""
        self._wait_seconds += wait_seconds
        now, began = self._clock(), self._since
        seconds = now - began
        if seconds < _STARVING_WINDOW_SECONDS:
            return None
        share, self._since, self._wait_seconds = self._wait_seconds / seconds, now, 0.0
        if share <= _STARVING_SHARE or began < self._silent_until:
            return None
        self._silent_until = now + _STARVING_SILENCE_SECONDS
        data, scaling = self._config.data, self._config.scaling
        return (
            f"steps waited for data for {100 * share:.0f} % of the last {seconds:.0f} s, so the loader sets the pace. "
            f"Raise data.loader_workers (now {data.loader_workers} a rank) where cores are free, with "
            f"scaling.cpus_per_worker (now {scaling.cpus_per_worker:g}) to keep them so; make shards of a smaller "
            f"--shard.short-side; read shards on s3:// from a nearer store, or keep them all: data.cache_gb (now "
            f"{data.cache_gb:g})"
        )


def _resume_or_start(
    config: TrainConfig,
    content: DatasetVersion,
    style: DatasetVersion,
    checkpoints: str,
    device: torch.device,
    start_from: str | None,
    data: dict[str, Any],
) -> tuple[TrainState, str]:
    compression = config.scaling.gradient_compression
    # One rank's answer for all: one that is published or removed meanwhile must not divide them.
    uri = distributed.gather(checkpoint.newest(checkpoints) if distributed.rank() == 0 else None)[0] or start_from
    if uri is None and config.init_from is not None:
        raise CheckpointError(
            f"{checkpoints}: expected the checkpoint of step 0 with the weights of {config.init_from}, found none that "
            "is whole; remove what lies there, and the same command makes it anew"
        )
    if uri is None:
        encoder = load_encoder(config.encoder.weights, widths=config.encoder.widths)
        if config.encoder.normalise == "data":
            if distributed.rank() == 0:
                normalise_encoder(encoder.to(device), _calibration_images(config, content, style))
            distributed.copy_from_first_rank(encoder.to(device))
        torch.manual_seed(config.train.seed)
        network = build_network(encoder=encoder, **config.model.model_dump())
        state = make_state(network, config.train, device=device, gradient_compression=compression)
        return state, fingerprint(encoder)
    with checkpoint.fetched(uri) as folder:
        refuse_other_run(uri, checkpoint.data_of(str(folder)), data)
        network, info = checkpoint.load_network(folder)
        network.train()
        state = make_state(network, config.train, device=device, gradient_compression=compression)
        state.load_trainer_dict(checkpoint.load_trainer(folder))
    if uri == start_from and state.step >= config.train.steps:
        raise CheckpointError(
            f"{uri} is at step {state.step}, train.steps is {config.train.steps}: expected a step before the last one; "
            "raise train.steps or start from an earlier checkpoint"
        )
    log.info("resumed from %s at step %d", uri, state.step)
    return state, info.encoder_fingerprint


def _calibration_images(config: TrainConfig, content: DatasetVersion, style: DatasetVersion) -> list[Tensor]:
    dataset = _dataset(config, content, style, calibration=True)
    given = [images for step in range(_CALIBRATION_BATCHES) for images in dataset[step].images]
    return [to_float(images.contiguous()) for images in given]


def _dataset(
    config: TrainConfig, content: DatasetVersion, style: DatasetVersion, *, calibration: bool = False
) -> PairDataset:
    """This rank's share of the batches, or the small whole batches that the encoder is calibrated with."""
    data, batch = config.data, config.train.global_batch_size
    return PairDataset(
        content,
        style,
        seed=config.train.seed,
        global_batch_size=_CALIBRATION_PAIRS if calibration else batch,
        content_geometry=Geometry(data.resize, data.crop, data.flip),
        style_geometry=Geometry(data.resize, data.crop, data.flip, data.rotate_style),
        rank=0 if calibration else distributed.rank(),
        num_ranks=1 if calibration else distributed.num_ranks(),
        partitions=math.gcd(_CALIBRATION_PAIRS, data.partitions) if calibration else data.partitions,
        block_shards=data.block_shards,
        skipped=() if calibration else data.skipped,  # the encoder was calibrated before anything was skipped
        cache=ShardCache(data.cache_dir or default_cache_dir(), int(data.cache_gb * 1e9)),
        verify=data.verify_samples,
    )


@dataclass
class _Report:
    """Sums since the last point of the metrics, and the line that is printed now and then."""

    config: TrainConfig
    first_step: int
    last: dict[str, float] = field(default_factory=dict)
    _losses: dict[str, Tensor] = field(default_factory=dict)
    _steps: int = 0
    _wait_seconds: float = 0.0
    _rate: float = 0.0
    _norm: float = 0.0

    def __post_init__(self) -> None:
        self._since = self._started = time.perf_counter()

    def add(self, losses: dict[str, Tensor], rate: float, norm: float, wait_seconds: float) -> None:
        for name, value in losses.items():
            self._losses[name] = self._losses.get(name, 0) + value
        self._steps += 1
        self._wait_seconds += wait_seconds
        self._rate, self._norm = rate, norm

    def metrics(self) -> dict[str, float]:
        """Means since the last call, over all ranks; resets them."""
        seconds = time.perf_counter() - self._since
        self.last = {name: total / self._steps for name, total in distributed.sum_over_ranks(self._losses).items()}
        values = {f"train/{name}": value for name, value in self.last.items()}
        values["train/learning_rate"] = self._rate
        values["train/gradient_norm"] = self._norm
        values["perf/images_per_second"] = self._steps * self.config.train.global_batch_size / seconds
        values["perf/step_seconds"] = seconds / self._steps
        values["data/wait_share"] = self._wait_seconds / seconds
        self._losses, self._steps, self._wait_seconds, self._since = {}, 0, 0.0, time.perf_counter()
        return values

    def line(self, step: int, metrics: dict[str, float]) -> str:
        steps = self.config.train.steps
        each = (time.perf_counter() - self._started) / max(1, step - self.first_step)
        return " | ".join(
            [
                f"step {step:05d}/{steps}",
                f"loss {metrics['train/loss']:.3f}",
                f"content {metrics['train/content_loss']:.3f}",
                f"style {metrics['train/style_loss']:.3f}",
                f"lr {metrics['train/learning_rate']:.1e}",
                f"{metrics['perf/images_per_second']:.3g} img/s",
                f"data wait {100 * metrics['data/wait_share']:.0f}%",
                f"eta {duration(each * (steps - step))}",
            ]
        )
