"""One optimizer update, through `adaconv.training.step.train_step` as ranks run it: against the peers' step.

Each side is a process of its own, because what the C library does with freed memory is settled when a process starts,
and is a good part of a step on CPUs. Ours keeps it, as ranks do; the baseline has glibc's defaults, as shipped, or the
same setting as ours (rows `.../same_allocator`).
"""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, Literal

import torch

from adaconv import allocator
from adaconv.model import work
from adaconv.model.work import Size
from adaconv.training.state import make_state
from adaconv.training.step import train_step
from bench.measure import Row, Side, alternate_processes, device, floor_seconds
from bench.peers import PEERS, NaotoAdaIN, RElbersAdaConv, naoto_step, relbers_step
from bench.sizes import SHORT, Precision, network_of, size_of

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
    "ema_decay": None,
    "micro_batch_size": None,
    "channels_last": True,
    "compile": False,
    "cuda_graph": True,
}
LOSS = {
    "content_weight": 1.0,
    "content_target": "raw",
    "style_weight": 10.0,
    "identity_weight": 0.0,
    "tv_weight": 0.0,
}


def rows(
    quick: bool,
    *,
    precision: Precision,
    architecture: Literal["adaconv", "adain"] = "adaconv",
    batch: int = 8,
    same_allocator: bool = False,
    compiled: bool = False,
    tf32: bool = False,
) -> Iterable[Row]:
    size = size_of(architecture, quick=quick)
    shared = {"size": size, "batch": batch}
    keep = allocator.environment()
    ours, theirs = alternate_processes(
        Side(our_step, {**shared, "precision": precision, "compiled": compiled}, keep),
        Side(peers_step, {**shared, "tf32": tf32}, keep if same_allocator else {}),
        rounds=1 if quick else 3,
    )
    dtype = getattr(torch, precision)
    flops = batch * work.train_flops(size)
    # Weights, gradients and Adam's two moments are read, all but the gradients written.
    moved = batch * work.train_values(size) * dtype.itemsize + 7 * work.trained_weights(size) * 4
    name = "adain/train_step" if architecture == "adain" else "train_step"
    how = "/same_allocator" if same_allocator else "/compiled" if compiled else "" if batch == 8 else f"/batch_{batch}"
    how += "/tf32" if tf32 else ""
    yield Row(
        f"{name}/{SHORT[precision]}{how}",
        ours.seconds,
        theirs.seconds,
        floor_seconds(flops, moved, dtype),
        unit=f"a step of {batch} at {size.side} px",
        against=f"{PEERS[architecture]}, float32, "
        + (f"on a GPU TF32 {'on' if tf32 else 'off'}, on a CPU ")
        + ("freed memory kept as ours does" if same_allocator else "as shipped: the C library's default allocator"),
        flops=flops,
        bytes_moved=moved,
        ours_peak_bytes=ours.peak_bytes,
        baseline_peak_bytes=theirs.peak_bytes,
    )


def our_step(*, size: Size, batch: int, precision: Precision, compiled: bool) -> Callable[[], Any]:
    torch.manual_seed(0)
    network = network_of(size)
    optim: Any = SimpleNamespace(**{**OPTIM, "compile": compiled}, precision=precision, global_batch_size=batch)
    loss: Any = SimpleNamespace(**LOSS)
    state = make_state(network, optim, device=device())
    content, style = torch.randint(0, 256, (2, batch, 3, size.side, size.side), dtype=torch.uint8)
    if torch.cuda.is_available():  # as the loader's
        content, style = content.pin_memory(), style.pin_memory()
    pairs: Any = SimpleNamespace(content=content, style=style, content_keys=[], style_keys=[])
    return lambda: train_step(state, pairs, optim=optim, loss=loss)


def peers_step(*, size: Size, batch: int, tf32: bool) -> Callable[[], Any]:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    step: Callable[[torch.Tensor, torch.Tensor], float]
    if size.architecture == "adain":
        step = naoto_step(NaotoAdaIN(widths=size.widths).to(device()))
    else:
        network = RElbersAdaConv(widths=size.widths, descriptor_channels=size.descriptor_channels, style_size=size.side)
        step = relbers_step(network.to(device()))
    content, style = torch.rand(2, batch, 3, size.side, size.side, device=device())
    return lambda: step(content, style)
