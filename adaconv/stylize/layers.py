"""The network as a chain of layers that each make a window of their map from a window of the one before.

Where a window touches the frame's border, its map is mirrored as in the network; elsewhere true neighbours are asked
for. So a window holds what the whole frame would hold there, but for rounding.

Letters: C channels, G groups, k kernel size, R regions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaconv.model.encoder import GROUPS, VGGEncoder
from adaconv.model.kernels import compose, instance_scale, per_input, widen
from adaconv.model.network import AdaConvTransfer, DecoderScale, StyleCode, StyleTransferNet
from adaconv.stylize.blend import kernels_of
from adaconv.stylize.raster import Raster, Window


class Layer(Protocol):
    def size_after(self, height: int, width: int) -> tuple[int, int]: ...

    def before(self, window: Window, height: int, width: int) -> Window:
        """What of an input of this size the output's window takes."""
        ...

    def __call__(self, x: Tensor, given: Window, wanted: Window) -> Tensor:
        """The wanted window from the one that `before` names; x may be changed."""
        ...


class _SameSize:
    half = 0

    def size_after(self, height: int, width: int) -> tuple[int, int]:
        return height, width

    def before(self, window: Window, height: int, width: int) -> Window:
        half = self.half
        return Window(
            max(0, window.top - half),
            min(height, window.bottom + half),
            max(0, window.left - half),
            min(width, window.right + half),
        )

    def _mirror(self, x: Tensor, given: Window, wanted: Window) -> Tensor:
        """What lies beyond the frame's border, where the window touches it."""
        half = self.half
        beyond = (
            half - (wanted.left - given.left),
            half - (given.right - wanted.right),
            half - (wanted.top - given.top),
            half - (given.bottom - wanted.bottom),
        )
        return F.pad(x, beyond, mode="reflect") if any(beyond) else x


@dataclass
class Convolve(_SameSize):
    """A fixed 3x3 convolution."""

    conv: nn.Conv2d
    relu: bool
    sigmoid: bool = False
    half = 1

    def __call__(self, x: Tensor, given: Window, wanted: Window) -> Tensor:
        x = F.conv2d(self._mirror(x, given, wanted), self.conv.weight, self.conv.bias)
        return x.relu_() if self.relu else x.sigmoid() if self.sigmoid else x


@dataclass
class Normalise(_SameSize):
    """Pixels as VGG-19 wants them."""

    encoder: VGGEncoder

    def __call__(self, x: Tensor, given: Window, wanted: Window) -> Tensor:
        return (x - self.encoder.mean) / self.encoder.std


class Halve:
    """Maxima of 2x2; sides are even, for frames are padded to multiples of 8."""

    def size_after(self, height: int, width: int) -> tuple[int, int]:
        return height // 2, width // 2

    def before(self, window: Window, height: int, width: int) -> Window:
        return window.scaled(2)

    def __call__(self, x: Tensor, given: Window, wanted: Window) -> Tensor:
        return F.max_pool2d(x, 2)


class Double:
    """Nearest upsampling."""

    def size_after(self, height: int, width: int) -> tuple[int, int]:
        return 2 * height, 2 * width

    def before(self, window: Window, height: int, width: int) -> Window:
        top, bottom, left, right = window
        return Window(top // 2, -(-bottom // 2), left // 2, -(-right // 2))

    def __call__(self, x: Tensor, given: Window, wanted: Window) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        top, left = wanted.top - 2 * given.top, wanted.left - 2 * given.left
        return x[..., top : top + wanted.height, left : left + wanted.width]


@dataclass
class Moments:
    """Mean and sum of squared deviations of each channel over windows that were added, merged in float64."""

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))

    def add(self, x: Tensor) -> None:
        """(1, C, h, w)."""
        x = x.float()
        count = x.shape[-2] * x.shape[-1]
        mean = x.mean(dim=(2, 3), keepdim=True)
        # By rows first: sums are shorter, and a CPU takes a fifth of the time.
        norm = torch.linalg.vector_norm(torch.linalg.vector_norm(x - mean, dim=3), dim=2)
        mean, squares = mean.flatten().double(), norm.flatten().double().square()
        shift = mean - self.mean.to(mean.device)
        total = self.count + count
        self.squares = self.squares.to(mean.device) + squares + shift.square() * (self.count * count / total)
        self.mean = self.mean.to(mean.device) + shift * (count / total)
        self.count = total

    @property
    def scale(self) -> Tensor:
        """(C,) float32: what instance norm multiplies with."""
        return instance_scale(self.mean, self.squares / self.count).float()


@dataclass
class Region:
    """A style and where it applies: `share` of each pixel, (1, 1, H, W) of the padded frame; None is everywhere."""

    code: StyleCode
    share: Raster | None = None


class Filter(_SameSize):
    """Instance norm with the frame's own statistics and the kernels of a style; of several, each to its share."""

    def __init__(self, regions: Sequence[Region], scale: int, moments: Sequence[Moments], *, stride: int) -> None:
        """`scale`: of the kernels, coarsest first. `moments`: of the map that each region's code meets.

        `stride`: pixels of the frame to one of the map.
        """
        self._parts = [self._fold(region.code, scale, m) for region, m in zip(regions, moments, strict=True)]
        self._shares = [region.share for region in regions]
        self._stride = stride

    def _fold(self, code: StyleCode, scale: int, moments: Moments) -> tuple[Tensor, Tensor, Tensor, int]:
        """Mean (1, C, 1, 1), weight (C, C/G or 8, k, k), bias (C,), groups."""
        mean = moments.mean.float().view(1, -1, 1, 1)
        if not kernels_of(code):  # AdaIN: deviation and mean of the style
            weight = (code["std"][0] * moments.scale).view(-1, 1, 1, 1)
            return mean, weight, code["mean"][0], len(weight)
        kernels = kernels_of(code)[scale]
        channels, per_group = kernels.depthwise.shape[1:3]
        weight = compose(kernels, groups=channels // per_group)
        weight = widen(weight * per_input(moments.scale[None], weight), weight.device)
        self.half = weight.shape[-1] // 2
        return mean, weight, kernels.bias[0], channels // weight.shape[1]

    def __call__(self, x: Tensor, given: Window, wanted: Window) -> Tensor:
        device = x.device.type
        dtype = x.dtype
        if torch.is_autocast_enabled(device):  # as adaptive_conv does
            dtype = torch.float32 if device == "cpu" else torch.get_autocast_dtype(device)
        total: Tensor | None = None
        with torch.autocast(device, enabled=False):
            for index, (mean, weight, bias, groups) in enumerate(self._parts):
                alone = len(self._parts) == 1
                centred = x.float().sub_(mean) if alone else x.float().sub(mean)
                padded = self._mirror(centred.to(dtype), given, wanted)
                out = F.conv2d(padded, weight.to(dtype), bias.to(dtype), groups=groups)
                share = self._shares[index]
                if share is not None:
                    out *= F.avg_pool2d(share.read(wanted.scaled(self._stride)).to(out), self._stride)
                total = out if total is None else total.add_(out)
        assert total is not None
        return total


def encoder_layers(network: StyleTransferNet) -> list[Layer]:
    """From the padded frame in [0, 1] to relu4_1."""
    layers: list[Layer] = [Normalise(network.encoder)]
    convs = iter(network.encoder.convs)
    for group, count in enumerate(GROUPS):
        layers += [Halve()] if group else []
        for _ in range(count):
            conv = next(convs)
            assert isinstance(conv, nn.Conv2d)
            layers.append(Convolve(conv, relu=True))
    return layers


def decoder_blocks(network: StyleTransferNet) -> list[tuple[list[Layer], list[Layer]]]:
    """For each adaptive block, coarsest first, what leads to it from where its statistics are taken, and what follows.

    Statistics are taken before upsampling: nearest upsampling changes none, and a quarter of the values is kept.
    """
    blocks: list[tuple[list[Layer], list[Layer]]] = []
    for index, scale in enumerate(network.transfer.scales):
        assert isinstance(scale, DecoderScale)
        up: list[Layer] = [Double()] if index else []
        convolve: list[Layer] = []
        for position, conv in enumerate(scale.convs):
            assert isinstance(conv, nn.Conv2d)
            end = scale.last and position == len(scale.convs) - 1
            convolve.append(Convolve(conv, relu=not end, sigmoid=end and scale.sigmoid))
        if index == 0 or isinstance(network.transfer, AdaConvTransfer):
            blocks.append((up, convolve))
        else:  # AdaIN has one block
            blocks[-1][1].extend([*up, *convolve])
    return blocks


def sizes_along(layers: Sequence[Layer], height: int, width: int) -> list[tuple[int, int]]:
    """Of the map before each layer, and after the last."""
    sizes = [(height, width)]
    for layer in layers:
        sizes.append(layer.size_after(*sizes[-1]))
    return sizes


def run(layers: Sequence[Layer], source: Raster, wanted: Window) -> Tensor:
    """The window of the chain's last map."""
    sizes = sizes_along(layers, source.height, source.width)
    windows = [wanted]
    for layer, size in zip(reversed(layers), reversed(sizes[:-1]), strict=True):
        windows.append(layer.before(windows[-1], *size))
    windows.reverse()
    x = source.read(windows[0])
    for layer, given, after in zip(layers, windows[:-1], windows[1:], strict=True):
        x = layer(x, given, after)
    return x
