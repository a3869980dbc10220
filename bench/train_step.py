"""One optimizer update, through `adaconv.training.step.train_step` as ranks run it: against the peers' step.

Each side is a process of its own, because what the C library does with freed memory is settled when a process starts,
and is a good part of a step on CPUs. Ours keeps it, as ranks do; the baseline has glibc's defaults, as shipped, or the
same setting as ours (rows `.../same_allocator`).
"""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, Literal

import torch

from adaconv.model.encoder import VGGEncoder
from adaconv.model.network import build_network
from adaconv.training import allocator
from adaconv.training.state import make_state
from adaconv.training.step import train_step
from bench import work
from bench.measure import Row, Side, alternate_processes, device, floor_seconds
from bench.peers import NaotoAdaIN, RElbersAdaConv, naoto_step, relbers_step
from bench.work import Size

Precision = Literal["float32", "bfloat16"]

# The defaults of OptimConfig and LossConfig, without pydantic, which a bare GPU machine need not have. The step takes
# any object with these attributes, and a batch likewise.
OPTIM = {
    "steps": 160_000,
    "learning_rate": 1e-4,
    "style_encoder_rate": 1.0,
    "schedule": "inverse_time",
    "decay": 5e-5,
    "warmup_steps": 0,
    "clip_norm": 10.0,
    "micro_batch_size": None,
    "channels_last": True,
}
LOSS = {"content_weight": 1.0, "style_weight": 10.0, "identity_weight": 0.0, "tv_weight": 0.0}


def fp32(quick: bool) -> Iterable[Row]:
    return _rows("train_step/fp32", quick, precision="float32")


def bf16(quick: bool) -> Iterable[Row]:
    return _rows("train_step/bf16", quick, precision="bfloat16")


def adain(quick: bool) -> Iterable[Row]:
    """The AdaIN baseline of this system against the reference of AdaIN."""
    return _rows("adain/train_step", quick, architecture="adain", baseline=naoto)


def _rows(name: str, quick: bool, *, baseline: Callable[..., Any] | None = None, **options: Any) -> Iterable[Row]:
    size, batch = (Size((8, 16, 32, 64), 16, 64), 2) if quick else (Size(), 8)
    rounds = 1 if quick else 3
    shared = {"size": size, "batch": batch}
    dtype = torch.bfloat16 if options.get("precision") == "bfloat16" else torch.float32
    weights = work.trained_weights(size)
    flops = batch * work.train_flops(size)
    # Weights, gradients and Adam's two moments are read, all but the gradients written.
    moved = batch * work.train_values(size) * dtype.itemsize + 7 * weights * 4
    whose = "naoto0804's AdaIN" if baseline is naoto else "RElbers' AdaConv"
    for suffix, environment, allocated in (
        ("", {}, "as shipped: float32, the C library's default allocator"),
        ("/same_allocator", allocator.environment(), "float32, freed memory kept for reuse as ours does"),
    ):
        ours, theirs = alternate_processes(
            Side(our_step, {**shared, **options}, allocator.environment()),
            Side(baseline or relbers, shared, environment),
            rounds=rounds,
        )
        yield Row(
            name + suffix,
            ours.seconds,
            theirs.seconds,
            floor_seconds(flops, moved, dtype),
            unit=f"a step of {batch} at {size.side} px",
            against=f"{whose}, {allocated}",
            flops=flops,
            bytes_moved=moved,
            ours_peak_bytes=ours.peak_bytes,
            baseline_peak_bytes=theirs.peak_bytes,
        )


def our_step(
    *,
    size: Size,
    batch: int,
    precision: Precision = "float32",
    architecture: Literal["adaconv", "adain"] = "adaconv",
) -> Callable[[], Any]:
    torch.manual_seed(0)
    network = build_network(
        encoder=VGGEncoder(widths=size.widths),
        architecture=architecture,
        descriptor_channels=size.descriptor_channels,
        groups=size.groups,
    )
    optim: Any = SimpleNamespace(**OPTIM, precision=precision, global_batch_size=batch)
    loss: Any = SimpleNamespace(**LOSS)
    state = make_state(network, optim, device=device())
    content, style = torch.randint(0, 256, (2, batch, 3, size.side, size.side), dtype=torch.uint8)
    pairs: Any = SimpleNamespace(content=content, style=style, content_keys=[], style_keys=[])
    return lambda: train_step(state, pairs, optim=optim, loss=loss)


def relbers(*, size: Size, batch: int) -> Callable[[], Any]:
    network = RElbersAdaConv(widths=size.widths, descriptor_channels=size.descriptor_channels, style_size=size.side).to(
        device()
    )
    step = relbers_step(network)
    content, style = torch.rand(2, batch, 3, size.side, size.side, device=device())
    return lambda: step(content, style)


def naoto(*, size: Size, batch: int) -> Callable[[], Any]:
    step = naoto_step(NaotoAdaIN(widths=size.widths).to(device()))
    content, style = torch.rand(2, batch, 3, size.side, size.side, device=device())
    return lambda: step(content, style)
