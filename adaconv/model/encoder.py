"""The frozen VGG-19 trunk to relu4_1 (Simonyan & Zisserman 2014) with reflect padding: images to features.

Letters: B batch, C channels, H W height and width.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaconv.model import gpu

# Convolutions between two poolings; the first of each group ends in relu1_1, relu2_1, relu3_1, relu4_1.
GROUPS = (2, 2, 4, 1)

Features = tuple[Tensor, Tensor, Tensor, Tensor]
Then = Literal["relu", "pool", "upsample", "last"]

# What follows each convolution, and which of their outputs are the four: all but the first come after a pooling.
THEN: tuple[Then, ...] = ("relu", "pool", "relu", "pool", "relu", "relu", "relu", "pool", "relu")
TAPS = (0, *accumulate(GROUPS[:-1]))


class ReflectConv2d(nn.Conv2d):
    """(B, C, H, W) -> (B, D, H, W): a 3x3 convolution of a map that is mirrored at its borders.

    The map is padded in the dtype it has. Autocast would pad in float32 and convert there and back, to the same values:
    1.4 times the time of a bfloat16 convolution of 64 channels at 256 px, forward and backward on a CPU.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, padding_mode="reflect")

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.of_padded(with_border(x), bias)

    def of_padded(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(B, C, H + 2, W + 2), a map with its border, and a bias to add -> (B, D, H, W)."""
        if not x.is_cuda or (x.dtype == torch.float32 and not torch.is_autocast_enabled("cuda")):
            return F.conv2d(x, self.weight, bias)
        # Tensor cores write 8 channels at a time: an image's 3 are filled up with zeros.
        weight, more = self.weight, -self.out_channels % 8
        if more:
            weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, more))
            bias = None if bias is None else F.pad(bias, (0, more))
        return F.conv2d(x, weight, bias)[:, : self.out_channels]


def with_border(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, H + 2, W + 2), mirrored at its borders, in the dtype that it has."""
    if gpu.maps is not None and gpu.maps.suits(x):
        padded: Tensor = gpu.maps.finish(x, negative=1.0, border=True)
        return padded
    with torch.autocast(x.device.type, enabled=False):
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    return padded.contiguous(memory_format=torch.channels_last) if x.is_cuda else padded


def convolve(x: Tensor, convs: Iterable[nn.Module], then: Sequence[Then]) -> Iterator[Tensor]:
    """A map through convolutions one after the other; yields what each gives.

    Args:
        x: (B, C, H, W).
        convs: ReflectConv2d, each followed by ReLU.
        then: what else it is followed by: nothing, the largest of 2x2 pixels, or each pixel four times. `last`: not
            even ReLU, and nothing comes after it.
    """
    convs = list(convs)
    if _fused(x, convs, then):
        yield from _convolve_padded(with_border(x), convs, then)
        return
    for conv, step in zip(convs, then, strict=True):
        x = conv(x)
        x = x if step == "last" else F.relu(x)
        if step == "pool":
            x = F.max_pool2d(x, 2)
        elif step == "upsample":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        yield x


def _fused(x: Tensor, convs: Iterable[Any], then: Sequence[Then]) -> bool:
    """Whether all maps on the way are such as `gpu.maps` takes."""
    if gpu.maps is None:
        return False
    (height, width), widths, largest = x.shape[2:], [], x.shape[1:].numel()
    smallest = height, width
    for conv, step in zip(convs, then, strict=True):
        widths += [conv.out_channels] if step != "last" else []
        largest = max(largest, conv.out_channels * height * width)
        if step == "pool":
            height, width = height // 2, width // 2
        elif step == "upsample":
            height, width = 2 * height, 2 * width
        largest = max(largest, conv.out_channels * height * width)
        smallest = min(smallest[0], height), min(smallest[1], width)
    fits: bool = gpu.maps.takes(x.device, _computed_in(x), widths, smallest, largest=largest)
    return fits


def _computed_in(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def _convolve_padded(padded: Tensor, convs: Iterable[Any], then: Sequence[Then]) -> Iterator[Tensor]:
    """The same of a map with its border, in one pass between two convolutions."""
    for index, (conv, step) in enumerate(zip(convs, then, strict=True)):
        if step == "last":
            x = conv.of_padded(padded, conv.bias)
        elif index == len(then) - 1:
            x = gpu.maps.finish(conv.of_padded(padded, None), conv.bias, negative=0.0, resample=gpu.maps.RESAMPLE[step])
        elif step == "relu":
            padded, x = gpu.maps.finish_and_tap(conv.of_padded(padded, None), conv.bias)
        else:
            y = conv.of_padded(padded, None)
            x = padded = gpu.maps.finish(y, conv.bias, negative=0.0, resample=gpu.maps.RESAMPLE[step], border=True)
        yield x


class VGGEncoder(nn.Module):
    """relu1_1 ... relu4_1 of an image.

    Always in eval mode and without gradients for its weights; gradients flow through it to its input.

    Args:
        widths: channels at relu1_1, relu2_1, relu3_1 and relu4_1; (64, 128, 256, 512) is VGG-19.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, widths: tuple[int, int, int, int] = (64, 128, 256, 512)) -> None:
        super().__init__()
        self.widths = widths
        self.convs = nn.ModuleList()
        channels = 3
        for width, count in zip(widths, GROUPS, strict=True):
            for _ in range(count):
                self.convs.append(ReflectConv2d(channels, width))
                channels = width
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "VGGEncoder":
        return super().train(False)

    def forward(self, image: Tensor) -> Features:
        """(B, 3, H, W) in [0, 1] -> relu1_1 (B, C1, H, W), relu2_1 (B, C2, H/2, W/2), relu3_1, relu4_1 (H/8, W/8)."""
        one, two, three, four = (x for index, x in enumerate(self._maps(image)) if index in TAPS)
        return one, two, three, four

    def relu4_1(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, C4, H/8, W/8); the other maps are let go."""
        features = image
        for features in self._maps(image):  # noqa: B007
            pass
        return features

    def _maps(self, image: Tensor) -> Iterator[Tensor]:
        first: Any
        first, *rest = self.convs
        dtype = _computed_in(image)
        if _fused(image, self.convs, THEN) and dtype.itemsize == 2:
            padded, x = gpu.maps.of_image(image, self.mean, self.std, first.weight, first.bias, dtype)
            yield x
            yield from _convolve_padded(padded, rest, THEN[1:])
        else:
            yield from convolve((image - self.mean) / self.std, self.convs, THEN)
