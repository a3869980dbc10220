"""How long a run will take on given hardware, what limits it first, and whether it can be at all: arithmetic alone.

    step = max(max(computing, launching) + what is left of the exchange, decoding, fetching)

Counted: FLOP (model/work.py), bytes of gradients, images. Taken from the configuration's `hardware` or measured on this
machine: rates. docs/design/scaling.md derives the terms and compares them with runs.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from adaconv import storage
from adaconv.data.order import StreamOrder
from adaconv.data.shard_cache import default_cache_dir
from adaconv.errors import UsageError
from adaconv.model import work
from adaconv.progress import duration

if TYPE_CHECKING:
    from adaconv.config.train import TrainConfig
    from adaconv.data.manifest import DatasetVersion

# Share of a step's FLOP that comes after the first gradients are ready for exchange: the decoder's and the predictors'
# backward pass come first, the style encoder's, with two thirds of all weights, last.
_OVERLAPPED = 0.3
# GiB of activations a pair of 256 px keeps for its gradient, without the identity loss: upper bounds of what
# `train_step/...` of bench/ took.
_ACTIVATION_GIB = {"float32": 0.36, "bfloat16": 0.30}
_PROCESS_GIB = 0.5
# Of an H200, through what was measured of it (docs/design/0007-network.md): 8.7 ms with 8 pairs and 25.0 with 32 in
# bfloat16, 72.5 with 32 in float32. The fixed part is a step's whatever its pairs.
_H200_TFLOPS, _H200_FIXED_SECONDS = {"bfloat16": 352.0, "float32": 110.0}, 3.3e-3


@dataclass(frozen=True)
class StepPlan:
    """Seconds of one step on `ranks` ranks, by what takes them; the parts overlap, so the largest counts."""

    ranks: int
    computing: float
    launching: float  # by Python, of a GPU's kernels, beside the computing; none where they are recorded
    exchanging: float  # what is left of it beside the backward pass
    decoding: float
    fetching: float
    gpu: bool = False

    @property
    def seconds(self) -> float:
        return max(max(self.computing, self.launching) + self.exchanging, self.decoding, self.fetching)

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of each, by its name and the settings that move it."""
        faster = "more ranks" if self.gpu else "train.compile, ranks on more machines"  # for one's ranks share its CPUs
        return {
            f"computing: train.precision bfloat16, {faster}": self.computing,
            "launching kernels: train.cuda_graph without micro-batches and train.compile": self.launching,
            "exchanging gradients: scaling.gradient_compression bfloat16, a larger global batch": self.exchanging,
            "decoding: data.loader_workers, more cores a rank, shards of a smaller side": self.decoding,
            "fetching shards: data.cache_gb for the whole dataset, a faster store": self.fetching,
        }

    @property
    def limit(self) -> str:
        """What takes longest, and the setting that moves it."""
        return max(self.parts, key=lambda name: self.parts[name])


def plan_step(
    config: TrainConfig,
    ranks: int,
    *,
    tflops: float,
    image_bytes: float,
    dataset_gb: float,
    cores: float,
    fixed_seconds: float = 0.0,
) -> StepPlan:
    """The step of a run on so many ranks.

    Args:
        config: of the run.
        ranks: DDP ranks, filled node by node.
        tflops: 10^12 operations a second that a rank attains.
        image_bytes: mean size of a stored image.
        dataset_gb: of both datasets, 10^9 bytes; 0 where they lie on a disk and nothing is fetched.
        cores: that decode for a rank.
        fixed_seconds: that computing takes besides, however few the pairs.
    """
    hardware, size = config.hardware, size_of(config)
    pairs = -(-config.train.global_batch_size // ranks)
    computing = fixed_seconds + pairs * work.train_flops(size, identity=_with_identity(config)) / (tflops * 1e12)
    gpu, part = config.scaling.gpus_per_worker > 0, min(config.train.micro_batch_size or pairs, pairs)
    # As training/state.py and step.py decide it: such ranks exchange behind the backward pass, recorded if it is whole.
    recording = gpu and config.train.cuda_graph and not config.train.compile
    launching = hardware.launch_ms / 1e3 * -(-pairs // part) if gpu and not (recording and part == pairs) else 0.0
    bytes_of_gradients = work.trained_weights(size) * (2 if config.scaling.gradient_compression == "bfloat16" else 4)
    nodes = -(-ranks // hardware.ranks_per_node)
    bandwidth = hardware.nvlink_gbyte * 1e9 if gpu and nodes == 1 else hardware.network_gbit * 1e9 / 8
    exchange = 2 * (ranks - 1) / ranks * bytes_of_gradients / bandwidth  # a ring; between nodes one link carries it
    decoding = 2 * pairs / (hardware.decode_per_core * (cores or 1))
    # What stays in the cache is fetched once; what does not fit, again in every epoch.
    fetched = 0.0 if dataset_gb <= config.data.cache_gb else 2 * config.train.global_batch_size * image_bytes / nodes
    return StepPlan(
        ranks=ranks,
        computing=computing,
        launching=launching,
        exchanging=exchange if recording else max(0.0, exchange - _OVERLAPPED * max(computing, launching)),
        decoding=decoding,
        fetching=fetched / (hardware.storage_mbyte * 1e6),
        gpu=gpu,
    )


def size_of(config: TrainConfig) -> work.Size:
    """What the FLOP counts need to know of a configuration."""
    model = config.model
    return work.Size(
        architecture=model.architecture,
        widths=config.encoder.widths,
        descriptor_channels=model.descriptor_channels,
        side=config.data.crop,
        predicted_groups=model.groups,
        descriptor_size=model.descriptor_size,
        kernel_size=model.kernel_size,
        predictor_padding=model.predictor_padding,
        decoder_convs=model.decoder_convs,
    )


def _with_identity(config: TrainConfig) -> bool:
    return config.loss.identity_weight > 0


def memory_gib(config: TrainConfig, ranks: int) -> float:
    """Of a rank: weights, gradients and moments, and the activations of what it takes through the network at once."""
    size, optim = size_of(config), config.train
    share = -(-optim.global_batch_size // ranks)
    pairs = min(optim.micro_batch_size or share, share)
    frozen = work.encoder_weights(size)
    copies = 4 + (optim.ema_decay is not None)  # weights, gradients, two moments, their average
    weights = 4 * (copies * work.trained_weights(size) + frozen) / 2**30
    scale = work.kept_values(size, identity=_with_identity(config)) / work.kept_values(work.Size())
    return _PROCESS_GIB + weights + pairs * scale * _ACTIVATION_GIB[optim.precision]


def describe(config: TrainConfig, content: DatasetVersion, style: DatasetVersion, *, ranks: Sequence[int]) -> str:
    """The plan as lines: a row for each number of ranks, the run's own first; and whether one alone would be faster.

    Raises:
        UsageError: the run is impossible: fewer shards than nodes, a cache that the shards in use do not fit, no disk
            for the cache, partitions that the shards do not admit, or more memory than a rank has, be they few or many.
            All problems at once.
    """
    hardware, scaling = config.hardware, config.scaling
    gpu = scaling.gpus_per_worker > 0
    fixed_seconds, shared = 0.0, False
    if hardware.tflops:
        tflops, source = hardware.tflops, "given"
    elif gpu:
        tflops, fixed_seconds = _H200_TFLOPS[config.train.precision], _H200_FIXED_SECONDS
        source = f"an H200's, and {fixed_seconds * 1e3:g} ms a step"
    else:
        tflops, source = measured_tflops(), "measured here"
        shared = True
    shards = (*content.shards, *style.shards)
    rows = sum(shard.rows for shard in shards)
    stored = sum(shard.bytes for shard in shards)
    remote = [version for version in (content, style) if not storage.is_local(version.root)]
    cores = hardware.cores_per_rank or config.data.loader_workers
    _refuse(config, content, style)

    size = size_of(config)
    flops = work.train_flops(size, identity=_with_identity(config))
    launching = f", {hardware.launch_ms:g} ms to launch a step that is not recorded" if gpu else ""
    lines = [
        f"reckoned with {tflops:.3g} TFLOP/s a {'node' if shared else 'rank'} ({source}), "
        f"{hardware.decode_per_core:.0f} images/s a core x "
        f"{cores:g}, {hardware.ranks_per_node} ranks a node{launching}",
        f"a step: {config.train.global_batch_size * flops / 1e9:.0f} GFLOP, "
        f"{work.trained_weights(size) * 4 / 1e6:.0f} MB of gradients; "
        f"a rank needs about {memory_gib(config, scaling.least_workers):.1f} GiB",
        "ranks  step      images/s  whole run  limit",
    ]

    def step_of(ranks: int) -> StepPlan:
        return plan_step(
            config,
            ranks,
            tflops=tflops / min(ranks, hardware.ranks_per_node) if shared else tflops,
            image_bytes=stored / max(1, rows),
            dataset_gb=_gb(remote),
            cores=cores,
            fixed_seconds=fixed_seconds,
        )

    counts = [n for n in dict.fromkeys([scaling.most_workers, *ranks]) if n <= config.train.global_batch_size]
    for number in counts:
        step = step_of(number)
        lines.append(
            f"{number:5d}  {step.seconds * 1e3:6.1f} ms {config.train.global_batch_size / step.seconds:9.1f}  "
            f"{duration(step.seconds * config.train.steps):>9}  {step.limit}"
        )
    own, alone = step_of(scaling.most_workers), step_of(1)
    if own.seconds > alone.seconds:
        what = max(own.parts, key=lambda name: own.parts[name] - alone.parts[name]).partition(":")[0]
        lines.append(
            f"{own.ranks} ranks would take longer than one, {own.seconds * 1e3:.1f} ms a step against "
            f"{alone.seconds * 1e3:.1f}, because of {what}: take a larger global batch or one "
            + ("GPU" if gpu else "rank")
        )
    return "\n".join(lines)


def _refuse(config: TrainConfig, content: DatasetVersion, style: DatasetVersion) -> None:
    hardware, scaling, data = config.hardware, config.scaling, config.data
    problems, remote = [], []
    nodes = -(-scaling.most_workers // hardware.ranks_per_node)  # whose ranks share a cache
    for name, version in (("content", content), ("style", style)):
        rows = [shard.rows for shard in version.shards]
        try:
            StreamOrder(rows, config.train.seed, name, config.train.global_batch_size, data.partitions)
        except UsageError as error:
            problems.append(str(error))
        if storage.is_local(version.root):
            continue
        remote.append(version)
        if len(version.shards) < nodes:
            problems.append(
                f"the {name} dataset has {len(version.shards)} shards, fewer than the {nodes} nodes of "
                f"{scaling.most_workers} ranks, {hardware.ranks_per_node} a node, so every node would fetch all of it: "
                "shard it with a smaller --shard.target-mb, or lower scaling.num_workers"
            )
    if remote:
        largest = max(shard.bytes for version in remote for shard in version.shards) / 1e9
        in_use = largest * sum(min(data.block_shards * data.partitions, len(version.shards)) for version in remote)
        if in_use > data.cache_gb:
            problems.append(
                f"the shards that are read side by side take {in_use:.1f} GB, data.cache_gb is {data.cache_gb:g}: "
                "raise it, or lower data.block_shards or data.partitions"
            )
        free = hardware.disk_gb or _free_gb(data.cache_dir or default_cache_dir())
        wanted = min(data.cache_gb, _gb(remote))
        if wanted > free:
            problems.append(
                f"the cache of shards may take {wanted:.1f} GB, {free:.1f} GB are free at "
                f"{data.cache_dir or default_cache_dir()}: lower data.cache_gb or name another data.cache_dir"
            )
    for ranks in dict.fromkeys((scaling.least_workers, scaling.most_workers)):
        beside = min(ranks, hardware.ranks_per_node)
        memory = hardware.memory_gb or (80 if scaling.gpus_per_worker else _memory_gib() / beside)
        needed = memory_gib(config, ranks)
        if needed > memory:
            problems.append(
                f"scaling.num_workers {ranks}: a rank needs about {needed:.1f} GiB, there are {memory:.1f}: lower "
                f"train.micro_batch_size (now {config.train.micro_batch_size or 'its whole share'}; the result stays "
                "the same) or data.crop, or give hardware.memory_gb where a rank has more"
            )
    if problems:
        raise UsageError("\n".join(problems))


def _gb(versions: Sequence[DatasetVersion]) -> float:
    return sum(shard.bytes for version in versions for shard in version.shards) / 1e9


def measured_tflops() -> float:
    """What convolutions attain here is near what a matrix product does: 10^12 operations a second."""
    side = 768
    a, b = torch.randn(2, side, side)
    a @ b
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds) / 1e12


def _free_gb(folder: str) -> float:
    path = Path(folder)
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / 1e9


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
