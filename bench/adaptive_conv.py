"""The adaptive convolution of all four scales of the paper's network: composed and grouped, against a loop.

Each side is a process of its own that keeps freed memory, as ranks do: with glibc's defaults both would mostly wait for
the system to clear pages.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch

from adaconv import allocator
from adaconv.model.adaptive_conv import AdaConvKernels, adaptive_conv, adaptive_conv_reference
from bench.measure import Row, Side, alternate_processes, copy_bytes, device, peak_flops

_SCALES = ((512, 512, 8), (256, 128, 4), (128, 32, 2), (64, 8, 1))  # channels, groups, stride of the map


def rows(quick: bool) -> list[Row]:
    return [_row("forward", quick), _row("train", quick)]


def _row(name: Literal["forward", "train"], quick: bool) -> Row:
    batch, side = (2, 128) if quick else (8, 256)
    shared = {"name": name, "batch": batch, "side": side}
    keep = allocator.environment()
    ours, loop = alternate_processes(
        Side(_work, {**shared, "loop": False}, keep),
        Side(_work, {**shared, "loop": True}, keep),
        rounds=3 if quick else 7,
    )
    flops = sum(batch * 2 * 9 * c * (c // g) * (side // s) ** 2 for c, g, s in _SCALES)
    moved = sum(2 * 4 * batch * c * (side // s) ** 2 for c, _, s in _SCALES)
    times = 3 if name == "train" else 1
    return Row(
        f"adaptive_conv/{name}",
        ours.seconds,
        loop.seconds,
        floor=times * max(flops / peak_flops(), moved / copy_bytes()),
        unit=f"four scales, batch {batch}, {side} px",
        against="a loop over the batch of two convolutions; both keep freed memory",
        ours_peak_bytes=ours.peak_bytes,
        baseline_peak_bytes=loop.peak_bytes,
    )


def _work(*, name: Literal["forward", "train"], batch: int, side: int, loop: bool) -> Callable[[], Any]:
    inputs = [_inputs(batch, channels, groups, side // stride) for channels, groups, stride in _SCALES]
    function = adaptive_conv_reference if loop else adaptive_conv

    def forward() -> None:
        with torch.inference_mode():
            for x, kernels, groups in inputs:
                function(x, kernels, groups=groups)

    def train() -> None:
        for x, kernels, groups in inputs:
            function(x, kernels, groups=groups).sum().backward()  # type: ignore[no-untyped-call]
            x.grad = None
            for kernel in kernels:
                kernel.grad = None

    return train if name == "train" else forward


def _inputs(batch: int, channels: int, groups: int, side: int) -> tuple[torch.Tensor, AdaConvKernels, int]:
    per_group = channels // groups

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device(), requires_grad=True)

    kernels = AdaConvKernels(
        draw(batch, channels, per_group, 3, 3), draw(batch, channels, per_group, 1, 1), draw(batch, channels)
    )
    return draw(batch, channels, side, side), kernels, groups
