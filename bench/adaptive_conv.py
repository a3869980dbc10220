"""The adaptive convolution of all four scales of the paper's network: composed and grouped, against a loop."""

from collections.abc import Callable

import torch

from adaconv.model.adaptive_conv import AdaConvKernels, adaptive_conv, adaptive_conv_reference
from bench.measure import Row, alternate, copy_bytes, device, peak_flops

_SCALES = ((512, 512, 8), (256, 128, 4), (128, 32, 2), (64, 8, 1))  # channels, groups, stride of the map


def rows(quick: bool) -> list[Row]:
    batch, side = (2, 128) if quick else (8, 256)
    rounds = 3 if quick else 7
    inputs = [_inputs(batch, channels, groups, side // stride) for channels, groups, stride in _SCALES]

    def forward(function: Callable[..., torch.Tensor]) -> None:
        with torch.inference_mode():
            for x, kernels, groups in inputs:
                function(x, kernels, groups=groups)

    def train(function: Callable[..., torch.Tensor]) -> None:
        for x, kernels, groups in inputs:
            function(x, kernels, groups=groups).sum().backward()  # type: ignore[no-untyped-call]
            x.grad = None
            for kernel in kernels:
                kernel.grad = None

    flops = sum(2 * x.numel() * kernels.depthwise[0, 0].numel() for x, kernels, _ in inputs)
    moved = sum(2 * 4 * x.numel() for x, _, _ in inputs)
    once = max(flops / peak_flops(), moved / copy_bytes())
    unit = f"four scales, batch {batch}, {side} px"
    forward_seconds = alternate(lambda: forward(adaptive_conv), lambda: forward(adaptive_conv_reference), rounds=rounds)
    train_seconds = alternate(lambda: train(adaptive_conv), lambda: train(adaptive_conv_reference), rounds=rounds)
    return [
        Row("adaptive_conv/forward", *forward_seconds, floor=once, unit=unit),
        Row("adaptive_conv/train", *train_seconds, floor=3 * once, unit=unit),
    ]


def _inputs(batch: int, channels: int, groups: int, side: int) -> tuple[torch.Tensor, AdaConvKernels, int]:
    per_group = channels // groups

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device(), requires_grad=True)

    kernels = AdaConvKernels(
        draw(batch, channels, per_group, 3, 3), draw(batch, channels, per_group, 1, 1), draw(batch, channels)
    )
    return draw(batch, channels, side, side), kernels, groups
