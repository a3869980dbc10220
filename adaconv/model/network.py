"""The networks: AdaConv (Chandran et al., CVPR 2021) and, behind the same interface, the AdaIN baseline.

    content ─▶ encoder ─▶ relu4_1 ────────────────▶ transfer.decode ─▶ stylized
    style   ─▶ encoder ─▶ relu4_1 ─▶ transfer.predict ─▶ StyleCode ─┘

A StyleCode is everything the decoder needs of a style: flat, tensors with the batch first, so that it can be saved,
mixed and faded. The encoder is frozen; `transfer` is what is trained, and what DDP wraps.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaconv.model.adaptive_conv import EPS, AdaConvKernels, adaptive_conv
from adaconv.model.encoder import VGGEncoder

StyleCode = dict[str, Tensor]

_STRIDE = 8  # of relu4_1
_PREDICTED_SHARE = 0.3


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, padding_mode="reflect")
    _initialise(conv)
    return conv


def _initialise(layer: nn.Module, *, std: float | None = None, bias: float = 0.0) -> None:
    """Normal weights, of He's deviation unless told; a constant bias: torch's random ones drown the style in W."""
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    assert layer.bias is not None
    fan_in = layer.weight[0].numel()
    nn.init.normal_(layer.weight, std=(2 / fan_in) ** 0.5 if std is None else std)
    nn.init.constant_(layer.bias, bias)


class StyleEncoder(nn.Module):
    """relu4_1 of a style to its descriptor W (Fig. 3): three times convolution, pooling, leaky ReLU; a linear map."""

    def __init__(self, channels: int, descriptor_channels: int, descriptor_size: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_conv(channels, channels) for _ in range(3))
        self.shape = (descriptor_channels, descriptor_size, descriptor_size)
        self.linear = nn.Linear(channels * 16, descriptor_channels * descriptor_size**2)
        _initialise(self.linear)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) of any size -> (B, S, s, s)."""
        smallest = 2 ** len(self.convs)  # what is smaller would leave the last convolution nothing to mirror
        height, width = (max(side, smallest) for side in features.shape[-2:])
        if (height, width) != features.shape[-2:]:
            features = F.interpolate(features, size=(height, width), mode="nearest")
        for conv in self.convs:
            features = F.leaky_relu(F.avg_pool2d(conv(features), 2, ceil_mode=True), 0.01)
        features = F.adaptive_avg_pool2d(features, 4)  # changes nothing for a style of 256 px
        descriptor = self.linear(features.flatten(1)).view(-1, *self.shape)
        # The output grows with the square of W's scale (depthwise times pointwise): keep it at one.
        return F.rms_norm(descriptor, self.shape, eps=EPS)


class KernelPredictor(nn.Module):
    """A descriptor to the kernels of one scale; with the paper's groups, 4,608 and 512 weights at each."""

    def __init__(self, descriptor_channels: int, channels: int, groups: int) -> None:
        super().__init__()
        self.channels, self.per_group = channels, channels // groups
        self.depthwise = _conv(descriptor_channels, channels * self.per_group)
        self.pointwise = nn.Conv2d(descriptor_channels, channels * self.per_group, 1)
        self.bias = nn.Conv2d(descriptor_channels, channels, 1)
        # What is predicted starts as a small part of the identity below, whatever the number of weights.
        for conv, size in ((self.depthwise, 9), (self.pointwise, 1), (self.bias, 1)):
            fan_in = conv.weight[0].numel()
            _initialise(conv, std=_PREDICTED_SHARE / (size * self.per_group * fan_in) ** 0.5)
        # An identity to start from: the predicted kernels are added to it, so an untrained block is an instance norm.
        delta = torch.zeros(channels, self.per_group, 3, 3)
        point = torch.zeros(channels, self.per_group, 1, 1)
        index = torch.arange(channels)
        delta[index, index % self.per_group, 1, 1] = 1
        point[index, index % self.per_group, 0, 0] = 1
        self.base_depthwise, self.base_pointwise = nn.Parameter(delta), nn.Parameter(point)

    def forward(self, descriptor: Tensor) -> AdaConvKernels:
        pooled = descriptor.mean(dim=(2, 3), keepdim=True)
        shape = (-1, self.channels, self.per_group)
        return AdaConvKernels(
            self.depthwise(descriptor).view(*shape, 3, 3) + self.base_depthwise,
            self.pointwise(pooled).view(*shape, 1, 1) + self.base_pointwise,
            self.bias(pooled).flatten(1),
        )


class DecoderScale(nn.Module):
    """The fixed convolutions of one scale, with ReLU after each but the image's."""

    def __init__(self, channels: int, out_channels: int, count: int, *, last: bool) -> None:
        super().__init__()
        widths = [channels] * count + [out_channels]
        self.convs = nn.ModuleList(_conv(a, b) for a, b in itertools.pairwise(widths))
        self.last = last
        if last:
            _initialise(self.convs[-1], std=0.1 / (9 * channels) ** 0.5, bias=0.5)  # start from grey

    def forward(self, x: Tensor) -> Tensor:
        for index, conv in enumerate(self.convs):
            x = conv(x)
            if not (self.last and index == len(self.convs) - 1):
                x = F.relu(x)
        return x if self.last else F.interpolate(x, scale_factor=2.0, mode="nearest")


def _decoder_scales(widths: Sequence[int], decoder_convs: Sequence[int]) -> nn.ModuleList:
    """From relu4_1 to the image, coarsest first."""
    scales = list(reversed(widths))
    outs = [*scales[1:], 3]
    return nn.ModuleList(
        DecoderScale(channels, out, count, last=out == 3)
        for channels, out, count in zip(scales, outs, decoder_convs, strict=True)
    )


class AdaConvTransfer(nn.Module):
    def __init__(
        self,
        *,
        widths: Sequence[int],
        descriptor_channels: int,
        descriptor_size: int,
        groups: Sequence[int],
        decoder_convs: Sequence[int],
    ) -> None:
        super().__init__()
        scales = list(reversed(widths))
        self.groups = tuple(groups)
        self.style_encoder = StyleEncoder(scales[0], descriptor_channels, descriptor_size)
        self.predictors = nn.ModuleList(
            KernelPredictor(descriptor_channels, c, g) for c, g in zip(scales, groups, strict=True)
        )
        self.scales = _decoder_scales(widths, decoder_convs)

    def predict(self, style_features: Tensor) -> StyleCode:
        """(B, C4, h, w) -> everything the decoder needs."""
        descriptor = self.style_encoder(style_features)
        code = {"descriptor": descriptor}
        for index, predictor in enumerate(self.predictors):
            for name, tensor in predictor(descriptor)._asdict().items():
                code[f"kernels.{index}.{name}"] = tensor
        return code

    def decode(self, content_features: Tensor, code: StyleCode) -> Tensor:
        """(B, C4, h, w) -> (B, 3, 8h, 8w), not clamped."""
        x = content_features
        for index, (scale, groups) in enumerate(zip(self.scales, self.groups, strict=True)):
            kernels = AdaConvKernels(*(code[f"kernels.{index}.{name}"] for name in AdaConvKernels._fields))
            x = scale(adaptive_conv(x, kernels, groups=groups))
        return x

    def forward(self, content_features: Tensor, style_features: Tensor) -> Tensor:
        return self.decode(content_features, self.predict(style_features))


class AdaINTransfer(nn.Module):
    """Means and deviations at relu4_1 (Huang & Belongie, ICCV 2017) and a decoder of the same shape."""

    def __init__(self, *, widths: Sequence[int], decoder_convs: Sequence[int]) -> None:
        super().__init__()
        self.scales = _decoder_scales(widths, decoder_convs)

    def predict(self, style_features: Tensor) -> StyleCode:
        variance, mean = torch.var_mean(style_features, dim=(2, 3), correction=0)
        return {"mean": mean, "std": (variance + EPS).sqrt()}

    def decode(self, content_features: Tensor, code: StyleCode) -> Tensor:
        x = F.instance_norm(content_features, eps=EPS) * code["std"][..., None, None] + code["mean"][..., None, None]
        for scale in self.scales:
            x = scale(x)
        return x

    def forward(self, content_features: Tensor, style_features: Tensor) -> Tensor:
        return self.decode(content_features, self.predict(style_features))


class StyleTransferNet(nn.Module):
    """Images in [0, 1] to images that are meant to lie there; clamp when writing."""

    def __init__(self, encoder: VGGEncoder, transfer: AdaConvTransfer | AdaINTransfer) -> None:
        super().__init__()
        self.encoder, self.transfer = encoder, transfer

    def encode_content(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) of any size -> relu4_1 of it padded to multiples of 8: (B, C4, ceil(H/8), ceil(W/8))."""
        return self.encoder.relu4_1(_pad_to_stride(image))

    def encode_style(self, image: Tensor) -> StyleCode:
        """(B, 3, h, w) of any size -> everything that `decode` needs of it."""
        return self.transfer.predict(self.encoder.relu4_1(_pad_to_stride(image)))

    def decode(self, content_features: Tensor, code: StyleCode, *, height: int, width: int) -> Tensor:
        """Features of a content of this size, and a code of the same batch or of one -> (B, 3, height, width)."""
        batch = len(content_features)
        expanded = {name: tensor.expand(batch, *tensor.shape[1:]) for name, tensor in code.items()}
        return self.transfer.decode(content_features, expanded)[..., :height, :width]

    def stylize(self, content: Tensor, code: StyleCode) -> Tensor:
        """(B, 3, H, W) of any size and a code of the same batch, or of one -> (B, 3, H, W)."""
        height, width = content.shape[-2:]
        return self.decode(self.encode_content(content), code, height=height, width=width)

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        return self.stylize(content, self.encode_style(style))


def _pad_to_stride(image: Tensor) -> Tensor:
    """Reflect to multiples of 8, and to 16 at least, below which the encoder's own reflection has nothing to mirror."""
    for axis in (-1, -2):
        side = image.shape[axis]
        target = max(16, -(-side // _STRIDE) * _STRIDE)
        order = torch.arange(target, device=image.device) % max(1, 2 * side - 2)
        order = torch.where(order < side, order, 2 * side - 2 - order)
        if target != side:
            image = image.index_select(axis, order)
    return image


def build_network(
    *,
    encoder: VGGEncoder,
    architecture: Literal["adaconv", "adain"] = "adaconv",
    descriptor_channels: int = 512,
    descriptor_size: int = 3,
    groups: Sequence[int] = (512, 128, 32, 8),
    decoder_convs: Sequence[int] = (1, 4, 2, 2),
) -> StyleTransferNet:
    """The network with fresh weights from torch's generator.

    Args:
        encoder: frozen, with its weights.
        architecture: `adaconv`, or the `adain` baseline.
        descriptor_channels: S of the style descriptor W (paper: s_d).
        descriptor_size: its height and width (paper: s_h, s_w).
        groups: of the adaptive convolutions, coarsest scale first; each divides its scale's channels (paper: n_g).
        decoder_convs: fixed convolutions of each scale, coarsest first.
    """
    transfer: AdaConvTransfer | AdaINTransfer
    if architecture == "adain":
        transfer = AdaINTransfer(widths=encoder.widths, decoder_convs=decoder_convs)
    else:
        transfer = AdaConvTransfer(
            widths=encoder.widths,
            descriptor_channels=descriptor_channels,
            descriptor_size=descriptor_size,
            groups=groups,
            decoder_convs=decoder_convs,
        )
    return StyleTransferNet(encoder, transfer)
