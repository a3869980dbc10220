"""What a part of the network takes: FLOP (multiply-adds times two, of convolutions and linear layers) and values moved.

All counts are of one image, and of square ones of a side that 64 divides. Letters: C channels, k kernel size.
"""

from dataclasses import dataclass
from typing import Literal

from adaconv.model.encoder import GROUPS


@dataclass(frozen=True)
class Size:
    """Of what is measured; see build_network. `side`: of a training pair's images and of every style, in pixels."""

    architecture: Literal["adaconv", "adain"] = "adaconv"
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    descriptor_channels: int = 512
    side: int = 256
    predicted_groups: tuple[int, int, int, int] | None = None
    descriptor_size: int = 3
    kernel_size: int = 3
    predictor_padding: Literal["same", "valid"] = "same"
    decoder_convs: tuple[int, int, int, int] = (1, 4, 2, 2)

    @property
    def groups(self) -> tuple[int, int, int, int]:
        """Of the adaptive convolutions, coarsest first; those of the paper have 1, 2, 4 and 8 channels each."""
        if self.predicted_groups:
            return self.predicted_groups
        one, two, three, four = self.widths
        return four, three // 2, two // 4, one // 8

    @property
    def predictor_taps(self) -> int:
        """Of the convolution that reads the depthwise kernels off the descriptor."""
        return 9 if self.predictor_padding == "same" else (self.descriptor_size - self.kernel_size + 1) ** 2

    @property
    def predicted(self) -> list[tuple[int, int]]:
        """Of each adaptive convolution: channels, and pointwise weights; depthwise ones are k² as many."""
        scales = zip(self.widths[::-1], self.groups, strict=True)
        return [(channels, channels * channels // groups) for channels, groups in scales]


def encoder_convs(size: Size, side: int) -> list[tuple[int, int, int]]:
    """Channels in, channels out and side of every convolution up to relu4_1."""
    convs, channels = [], 3
    for width, count in zip(size.widths, GROUPS, strict=True):
        for _ in range(count):
            convs.append((channels, width, side))
            channels = width
        side //= 2
    return convs


def decoder_convs(size: Size, side: int) -> list[tuple[int, int, int]]:
    """The same of the decoder's fixed convolutions."""
    convs = []
    scales = size.widths[::-1]
    for scale, (channels, after, count) in enumerate(zip(scales, (*scales[1:], 3), size.decoder_convs, strict=True)):
        of_scale = side // 8 << scale
        convs += [(channels, channels, of_scale)] * (count - 1) + [(channels, after, of_scale)]
    return convs


def _flops(convs: list[tuple[int, int, int]]) -> float:
    return sum(2 * 9 * inputs * outputs * side**2 for inputs, outputs, side in convs)


def _values(convs: list[tuple[int, int, int]]) -> float:
    return sum(outputs * side**2 for _, outputs, side in convs)


def encoder_flops(size: Size, side: int) -> float:
    return _flops(encoder_convs(size, side))


def style_flops(size: Size) -> float:
    """relu4_1 of a style to all kernels: three convolutions, the linear layer, four predictors."""
    if size.architecture == "adain":
        return 0
    channels, descriptor, side = size.widths[-1], size.descriptor_channels, size.side // 8
    convs = _flops([(channels, channels, side // 2**stage) for stage in range(3)])
    linear = 2 * channels * 16 * descriptor * size.descriptor_size**2
    depthwise = size.predictor_taps * size.kernel_size**2
    predictors = sum(2 * descriptor * ((depthwise + 1) * weights + width) for width, weights in size.predicted)
    return convs + linear + predictors


def adaptive_flops(size: Size, side: int) -> float:
    """Of the four adaptive convolutions, each composed into one."""
    if size.architecture == "adain":
        return 0
    each = 2 * size.kernel_size**2
    return sum(each * weights * (side // 8 << scale) ** 2 for scale, (_, weights) in enumerate(size.predicted))


def decoder_flops(size: Size, side: int) -> float:
    return _flops(decoder_convs(size, side)) + adaptive_flops(size, side)


def stylize_flops(size: Size, side: int, *, style_cached: bool = False) -> float:
    """One content of this side with one style."""
    style = 0 if style_cached else encoder_flops(size, size.side) + style_flops(size)
    return encoder_flops(size, side) + style + decoder_flops(size, side)


def stylize_values(size: Size, side: int, *, style_cached: bool = False) -> float:
    """Values written and read again: each map once, and what is adapted to the style."""
    scales = size.widths[::-1] if size.architecture == "adaconv" else size.widths[-1:]
    adaptive = sum(c * (side // 8 << scale) ** 2 for scale, c in enumerate(scales))
    maps = _values(encoder_convs(size, side)) + _values(decoder_convs(size, side)) + adaptive
    return 2 * (maps + (0 if style_cached else _values(encoder_convs(size, size.side))))


def encoder_weights(size: Size) -> float:
    return sum(9 * inputs * outputs for inputs, outputs, _ in encoder_convs(size, size.side))


def trained_weights(size: Size) -> float:
    """Without biases and the identities, which are few."""
    channels, descriptor = size.widths[-1], size.descriptor_channels
    fixed = sum(9 * inputs * outputs for inputs, outputs, _ in decoder_convs(size, size.side))
    if size.architecture == "adain":
        return fixed
    predicted = sum((size.predictor_taps + 1) * weights + width for width, weights in size.predicted)
    linear = channels * 16 * descriptor * size.descriptor_size**2
    return 27 * channels**2 + linear + descriptor * predicted + fixed


def train_flops(size: Size, *, identity: bool = False) -> float:
    """One pair: three encodes, back through the last to its image; style encoder and decoder forward and twice back.

    The first convolution behind the frozen encoder, of the style encoder or of AdaIN's decoder, passes nothing on to
    it. With the identity loss an image goes through style encoder and decoder once more; its pixels are compared.
    """
    channels, side = size.widths[-1], size.side
    first = (channels, channels, side // 8) if size.architecture == "adaconv" else decoder_convs(size, side)[0]
    trained = 3 * (style_flops(size) + decoder_flops(size, side)) - _flops([first])
    return 4 * encoder_flops(size, side) + (2 if identity else 1) * trained


def train_values(size: Size) -> float:
    """One pair: what a pass forward moves, and twice the stylized image's part of it again on the way back."""
    forward = stylize_values(size, size.side) + 2 * _values(encoder_convs(size, size.side))
    back = stylize_values(size, size.side, style_cached=True)  # decoder and the output's encoder
    return forward + 2 * back


def kept_values(size: Size, *, identity: bool = False) -> float:
    """One pair: maps that are kept for the gradient, of decoder and the output's encoder; see `train_flops`."""
    kept = stylize_values(size, size.side, style_cached=True) / 2
    return kept + (kept - _values(encoder_convs(size, size.side)) if identity else 0)
