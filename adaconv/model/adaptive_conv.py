"""The adaptive convolution: each image is filtered with kernels predicted from its own style (paper, section 3.1).

Letters: B batch, C channels, G groups, k kernel size, H W height and width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-5  # on the variance: 1e-7 on the deviation would amplify the noise of a constant channel 200 times


class AdaConvKernels(NamedTuple):
    """Kernels of one scale. depthwise (B, C, C/G, k, k), pointwise (B, C, C/G, 1, 1), bias (B, C)."""

    depthwise: Tensor
    pointwise: Tensor
    bias: Tensor


def adaptive_conv_reference(x: Tensor, kernels: AdaConvKernels, *, groups: int) -> Tensor:
    """What the block is, image by image: instance norm, depthwise convolution, pointwise convolution, bias.

    Args:
        x: (B, C, H, W) content features, any floating dtype.
        kernels: of the same batch.
        groups: G, a divisor of C.

    Returns:
        (B, C, H, W).
    """
    outputs = []
    half = kernels.depthwise.shape[-1] // 2
    for image, depthwise, pointwise, bias in zip(x, *kernels, strict=True):
        mean = image.mean(dim=(1, 2), keepdim=True)
        variance = image.var(dim=(1, 2), keepdim=True, correction=0)
        normal = ((image - mean) / (variance + EPS).sqrt())[None]
        filtered = F.conv2d(F.pad(normal, (half,) * 4, mode="reflect"), depthwise, groups=groups)
        outputs.append(F.conv2d(filtered, pointwise, bias, groups=groups))
    return torch.cat(outputs)


def adaptive_conv(x: Tensor, kernels: AdaConvKernels, *, groups: int) -> Tensor:
    """The same for the whole batch at once.

    A grouped pointwise after a grouped depthwise convolution of the same groups is one grouped convolution, so the two
    predicted kernels are composed; the batch becomes groups of that one convolution.
    """
    batch, channels = x.shape[:2]
    half = kernels.depthwise.shape[-1] // 2
    normal = F.instance_norm(x, eps=EPS)
    padded = F.pad(normal, (half,) * 4, mode="reflect").flatten(0, 1)[None]  # (1, B*C, H+2h, W+2h)
    weight = compose(kernels, groups=groups).flatten(0, 1)  # (B*C, C/G, k, k)
    out = F.conv2d(padded, weight, kernels.bias.flatten(), groups=batch * groups)
    return out.view(batch, channels, *out.shape[-2:])


def compose(kernels: AdaConvKernels, *, groups: int) -> Tensor:
    """One kernel that does both convolutions: (B, C, C/G, k, k)."""
    batch, channels, per_group, size, _ = kernels.depthwise.shape
    depthwise = kernels.depthwise.reshape(batch, groups, channels // groups, per_group * size * size)
    pointwise = kernels.pointwise.reshape(batch, groups, channels // groups, per_group)
    return (pointwise @ depthwise).reshape(batch, channels, per_group, size, size)
