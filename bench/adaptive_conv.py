"""The adaptive convolution of all four scales of the paper's network: composed and grouped, against a loop.

Each side is a process of its own that keeps freed memory, as ranks do: with glibc's defaults both would mostly wait for
the system to clear pages.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch

from adaconv import allocator
from adaconv.model.adaptive_conv import adaptive_conv, adaptive_conv_reference
from adaconv.model.kernels import AdaConvKernels
from bench.measure import Row, Side, alternate_processes, as_recorded, copy_bytes, device, peak_flops

_SCALES = ((512, 512, 8), (256, 128, 4), (128, 32, 2), (64, 8, 1))  # channels, groups, stride of the map


def rows(quick: bool, *, precision: Literal["float32", "bfloat16"], batch: int = 8) -> list[Row]:
    return [_row(name, quick, precision, batch) for name in ("forward", "train")]


def _row(name: str, quick: bool, precision: Literal["float32", "bfloat16"], batch: int) -> Row:
    named = batch
    side, batch = (128, 2) if quick else (256, batch)
    shared = {"name": name, "batch": batch, "side": side}
    keep = allocator.environment()
    ours, loop = alternate_processes(
        Side(_work, {**shared, "precision": precision, "loop": False}, keep),
        Side(_work, {**shared, "precision": "float32", "loop": True}, keep),
        rounds=3 if quick else 7,
    )
    dtype = getattr(torch, precision)
    flops = sum(batch * 2 * 9 * c * (c // g) * (side // s) ** 2 for c, g, s in _SCALES)
    moved = sum(2 * dtype.itemsize * batch * c * (side // s) ** 2 for c, _, s in _SCALES)
    times = 3 if name == "train" else 1
    how = ("" if precision == "float32" else "/bf16") + ("" if named == 8 else f"/batch_{named}")
    return Row(
        f"adaptive_conv/{name}{how}",
        ours.seconds,
        loop.seconds,
        floor=times * max(flops / peak_flops(dtype), moved / copy_bytes()),
        unit=f"four scales, batch {batch}, {side} px",
        against="a loop over the batch of two convolutions, float32; both keep freed memory",
        ours_peak_bytes=ours.peak_bytes,
        baseline_peak_bytes=loop.peak_bytes,
    )


def _work(*, name: str, batch: int, side: int, precision: str, loop: bool) -> Callable[[], Any]:
    inputs = [_inputs(batch, channels, groups, side // stride) for channels, groups, stride in _SCALES]
    if loop:
        function = adaptive_conv_reference
    else:
        function = adaptive_conv
        layout = torch.channels_last if device().type == "cuda" else torch.contiguous_format
        inputs = [
            (x.detach().to(getattr(torch, precision), memory_format=layout).requires_grad_(), kernels, groups)
            for x, kernels, groups in inputs
        ]
    slopes = [torch.randn_like(x) for x, _, _ in inputs]

    def forward() -> None:
        with torch.inference_mode(), _precision(precision):
            for x, kernels, groups in inputs:
                function(x, kernels, groups=groups)

    def train() -> None:
        for (x, kernels, groups), slope in zip(inputs, slopes, strict=True):
            with _precision(precision):
                out = function(x, kernels, groups=groups)
            out.backward(slope.to(out.dtype))  # type: ignore[no-untyped-call]
            for leaf in (x, *kernels):
                leaf.grad = None

    work = train if name == "train" else forward
    return work if loop else as_recorded(work)


def _precision(precision: str) -> torch.autocast:
    return torch.autocast(device().type, torch.bfloat16, enabled=precision == "bfloat16")


def _inputs(batch: int, channels: int, groups: int, side: int) -> tuple[torch.Tensor, AdaConvKernels, int]:
    per_group = channels // groups

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device(), requires_grad=True)

    kernels = AdaConvKernels(
        draw(batch, channels, per_group, 3, 3), draw(batch, channels, per_group, 1, 1), draw(batch, channels)
    )
    return draw(batch, channels, side, side), kernels, groups
