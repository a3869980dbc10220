"""Kernels that a style predicts, and how they are joined for the convolutions that machines are fast at.

Letters: B batch, C channels, G groups, k kernel size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-5  # on the variance: 1e-7 on the deviation would amplify the noise of a constant channel 200 times

# Of the largest mean of a map's channels: what 32 bits leave of a constant after a convolution deviates by less.
_ROUNDING = 2e-6

# oneDNN's vectorised kernels want 8 channels a group; zeros that fill up 2 or 4 to 8 cost less than its plain loops.
_CPU_GROUP_WIDTH = 8


class AdaConvKernels(NamedTuple):
    """Kernels of one scale. depthwise (B, C, C/G, k, k), pointwise (B, C, C/G, 1, 1), bias (B, C)."""

    depthwise: Tensor
    pointwise: Tensor
    bias: Tensor


def compose(kernels: AdaConvKernels, *, groups: int) -> Tensor:
    """One kernel that does both convolutions: (B, C, C/G, k, k)."""
    batch, channels, per_group, size, _ = kernels.depthwise.shape
    depthwise = kernels.depthwise.reshape(batch, groups, channels // groups, per_group * size * size)
    pointwise = kernels.pointwise.reshape(batch, groups, channels // groups, per_group)
    # Products of single numbers would go through a library's matrix product one by one.
    joined = pointwise * depthwise if per_group == 1 else pointwise @ depthwise
    return joined.reshape(batch, channels, per_group, size, size)


def instance_scale(mean: Tensor, variance: Tensor) -> Tensor:
    """What instance norm multiplies the channels of a map with: mean and variance (..., C) -> (..., C).

    0 where a channel deviates by no more than rounding does: three blocks one after another would make a picture of it,
    another one in each tile, of a frame that is black.
    """
    flat = variance <= (_ROUNDING * mean.abs().amax(dim=-1, keepdim=True)).square()
    return (variance + EPS).rsqrt().masked_fill(flat, 0)


def per_input(scale: Tensor, weight: Tensor) -> Tensor:
    """(B, C) of input channels -> (B, C, C/G, 1, 1), which multiplies the inputs of every output channel."""
    batch, channels, per_group = weight.shape[:3]
    of_group = scale.view(batch, channels // per_group, 1, per_group)
    return of_group.expand(-1, -1, per_group, -1).reshape(batch, channels, per_group, 1, 1)


def widen(weight: Tensor, device: torch.device) -> Tensor:
    """(B, C, C/G, k, k) -> (B*C, wide, k, k): groups joined, with zeros between them, where that is fast."""
    batch, channels, per_group, *size = weight.shape
    joined = _CPU_GROUP_WIDTH // per_group
    if device.type != "cpu" or per_group == 1 or joined < 2 or channels % _CPU_GROUP_WIDTH:
        return weight.flatten(0, 1)
    blocks = weight.view(-1, joined, per_group, per_group, *size)
    wide = weight.new_zeros(len(blocks), joined, per_group, joined, per_group, *size)
    for index in range(joined):
        wide[:, index, :, index] = blocks[:, index]
    return wide.view(batch * channels, _CPU_GROUP_WIDTH, *size)


def narrow(wide: Tensor, shape: torch.Size) -> Tensor:
    """What `widen` put in: (B, C, C/G, k, k)."""
    per_group, size = shape[2], shape[3:]
    if wide.shape[1] == per_group:
        return wide.view(shape)
    joined = wide.shape[1] // per_group
    blocks = wide.view(-1, joined, per_group, joined, per_group, *size)
    return torch.stack([blocks[:, index, :, index] for index in range(joined)], dim=1).view(shape)
