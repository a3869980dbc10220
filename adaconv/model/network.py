"""The networks: AdaConv (Chandran et al., CVPR 2021) and, behind the same interface, the AdaIN baseline.

    content ─▶ encoder ─▶ relu4_1 ────────────────▶ transfer.decode ─▶ stylized
    style   ─▶ encoder ─▶ relu4_1 ─▶ transfer.predict ─▶ StyleCode ─┘

A StyleCode is everything the decoder needs of a style: flat, tensors with the batch first, so that it can be saved,
mixed and faded. The encoder is frozen; `transfer` is what is trained, and what DDP wraps.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaconv.model import gpu
from adaconv.model.adaptive_conv import adaptive_conv
from adaconv.model.encoder import ReflectConv2d, Then, VGGEncoder, convolve, with_border
from adaconv.model.kernels import EPS, AdaConvKernels

StyleCode = dict[str, Tensor]

STRIDE = 8  # of relu4_1
_SLOPE = 0.01  # of the style encoder's leaky ReLU
_PREDICTED_SHARE = 0.3  # of the identity, at the start


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    conv = ReflectConv2d(in_channels, out_channels)
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

    def __init__(
        self,
        channels: int,
        descriptor_channels: int,
        descriptor_size: int,
        *,
        style_block: Literal["conv_pool_act", "conv_act_pool"],
        descriptor_norm: bool,
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_conv(channels, channels) for _ in range(3))
        self.shape = (descriptor_channels, descriptor_size, descriptor_size)
        self.linear = nn.Linear(channels * 16, descriptor_channels * descriptor_size**2)
        _initialise(self.linear)
        self.pool_first, self.descriptor_norm = style_block == "conv_pool_act", descriptor_norm

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) of any size -> (B, S, s, s)."""
        smallest = 2 ** len(self.convs)  # what is smaller would leave the last convolution nothing to mirror
        height, width = (max(side, smallest) for side in features.shape[-2:])
        if (height, width) != features.shape[-2:]:
            features = F.interpolate(features, size=(height, width), mode="nearest")
        conv: Any
        for conv in self.convs:
            even = features.shape[2] % 2 == features.shape[3] % 2 == 0
            if self.pool_first and even and gpu.maps is not None and gpu.maps.suits(features):
                y = conv.of_padded(with_border(features), None)
                features = gpu.maps.finish(y, conv.bias, negative=_SLOPE, resample=gpu.maps.AVERAGE)
                continue
            features = conv(features)
            if self.pool_first:
                features = F.leaky_relu(F.avg_pool2d(features, 2, ceil_mode=True), _SLOPE)
            else:
                features = F.avg_pool2d(F.leaky_relu(features, _SLOPE), 2, ceil_mode=True)
        features = F.adaptive_avg_pool2d(features, 4)  # changes nothing for a style of 256 px
        with torch.autocast(features.device.type, enabled=False):
            # In float32: a sum of thousands of terms, once a style; its weights are not worth a conversion either.
            descriptor = self.linear(features.flatten(1).to(self.linear.weight.dtype)).view(-1, *self.shape)
            # The output grows with the square of W's scale (depthwise times pointwise): keep it at one.
            return F.rms_norm(descriptor, self.shape, eps=EPS) if self.descriptor_norm else descriptor


class KernelPredictor(nn.Module):
    """A descriptor to the kernels of one scale (Fig. 2); with the paper's groups, 4,608 and 512 weights at each.

    A convolution reads the depthwise kernels off the descriptor; pointwise kernels and bias are read off its mean.
    """

    def __init__(
        self,
        descriptor_channels: int,
        descriptor_size: int,
        channels: int,
        groups: int,
        *,
        kernel_size: int,
        predictor_padding: Literal["same", "valid"],
        predictor_padding_mode: Literal["reflect", "zeros"],
        identity_base: bool,
    ) -> None:
        super().__init__()
        same = predictor_padding == "same"
        if channels % groups:
            raise ValueError(f"{groups} groups do not divide the {channels} channels of their scale")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernels of {kernel_size}x{kernel_size} have no middle: expected an odd kernel_size")
        if descriptor_size < kernel_size or (same and descriptor_size != kernel_size):
            raise ValueError(
                f"a descriptor of {descriptor_size}x{descriptor_size} gives no kernels of {kernel_size}x{kernel_size} "
                f"with predictor_padding {predictor_padding}: it must be {'as large' if same else 'at least as large'}"
            )
        self.channels, self.per_group, self.kernel_size = channels, channels // groups, kernel_size
        # `valid`: each tap of a kernel sees a part of the descriptor of its own, as Fig. 3 draws it.
        size = 3 if same else descriptor_size - kernel_size + 1
        self.depthwise = nn.Conv2d(
            descriptor_channels,
            channels * self.per_group,
            size,
            padding=size // 2 if same else 0,
            padding_mode=predictor_padding_mode,
        )
        self.pointwise = nn.Conv2d(descriptor_channels, channels * self.per_group, 1)
        self.bias = nn.Conv2d(descriptor_channels, channels, 1)
        share = _PREDICTED_SHARE if identity_base else 1.0
        # Whatever the number of weights, what is predicted has a variance of share^2 over each output's inputs: without
        # the base, blocks pass on unit variance; with it, they start as a small part of the identity.
        for conv, taps in ((self.depthwise, kernel_size**2), (self.pointwise, 1), (self.bias, 1)):
            fan_in = conv.weight[0].numel()
            _initialise(conv, std=share / (taps * self.per_group * fan_in) ** 0.5)
        self.identity_base = identity_base
        if identity_base:
            # The predicted kernels are added to an identity, so an untrained block is little more than instance norm.
            middle, index = kernel_size // 2, torch.arange(channels)
            delta = torch.zeros(channels, self.per_group, kernel_size, kernel_size)
            point = torch.zeros(channels, self.per_group)
            delta[index, index % self.per_group, middle, middle] = 1
            point[index, index % self.per_group] = 1
            self.base_depthwise, self.base_pointwise = nn.Parameter(delta), nn.Parameter(point)

    def forward(self, descriptor: Tensor) -> AdaConvKernels:
        """(B, S, s, s) -> kernels of a batch of B."""
        pooled = descriptor.mean(dim=(2, 3), keepdim=True)
        shape, size = (-1, self.channels, self.per_group), self.kernel_size
        depthwise = self.depthwise(descriptor).view(*shape, size, size)
        pointwise = self.pointwise(pooled).view(*shape, 1, 1)
        if self.identity_base:
            depthwise = depthwise + self.base_depthwise
            pointwise = pointwise + self.base_pointwise[..., None, None]
        return AdaConvKernels(depthwise, pointwise, self.bias(pooled).flatten(1))


class DecoderScale(nn.Module):
    """The fixed convolutions of one scale, with ReLU after each but the image's; nearest upsampling."""

    def __init__(self, channels: int, out_channels: int, count: int, *, last: bool, sigmoid: bool) -> None:
        super().__init__()
        widths = [channels] * count + [out_channels]
        self.convs = nn.ModuleList(_conv(a, b) for a, b in itertools.pairwise(widths))
        self.last, self.sigmoid = last, sigmoid
        if last:
            grey = 0.0 if sigmoid else 0.5  # what an untrained network answers
            _initialise(self.convs[-1], std=0.1 / (9 * channels) ** 0.5, bias=grey)

    def forward(self, x: Tensor) -> Tensor:
        steps: list[Then] = ["relu"] * (len(self.convs) - 1)
        *_, out = convolve(x, self.convs, [*steps, "last" if self.last else "upsample"])
        return out.sigmoid() if self.last and self.sigmoid else out


def _decoder_scales(
    widths: Sequence[int], decoder_convs: Sequence[int], output_activation: Literal["none", "sigmoid"]
) -> nn.ModuleList:
    """From relu4_1 to the image, coarsest first."""
    scales = list(reversed(widths))
    outs = [*scales[1:], 3]
    return nn.ModuleList(
        DecoderScale(channels, out, count, last=index == len(scales) - 1, sigmoid=output_activation == "sigmoid")
        for index, (channels, out, count) in enumerate(zip(scales, outs, decoder_convs, strict=True))
    )


class AdaConvTransfer(nn.Module):
    """What is trained of AdaConv: style encoder, kernel predictors, decoder. See build_network for the arguments."""

    def __init__(
        self,
        *,
        widths: Sequence[int],
        descriptor_channels: int,
        descriptor_size: int,
        descriptor_norm: bool,
        style_block: Literal["conv_pool_act", "conv_act_pool"],
        groups: Sequence[int],
        kernel_size: int,
        predictor_padding: Literal["same", "valid"],
        predictor_padding_mode: Literal["reflect", "zeros"],
        identity_base: bool,
        decoder_convs: Sequence[int],
        output_activation: Literal["none", "sigmoid"],
    ) -> None:
        super().__init__()
        scales = list(reversed(widths))
        self.groups = tuple(groups)
        self.smallest_map = kernel_size // 2 + 1  # a side that reflection can pad for these kernels
        self.style_encoder = StyleEncoder(
            scales[0],
            descriptor_channels,
            descriptor_size,
            style_block=style_block,
            descriptor_norm=descriptor_norm,
        )
        self.predictors = nn.ModuleList(
            KernelPredictor(
                descriptor_channels,
                descriptor_size,
                channels,
                of_scale,
                kernel_size=kernel_size,
                predictor_padding=predictor_padding,
                predictor_padding_mode=predictor_padding_mode,
                identity_base=identity_base,
            )
            for channels, of_scale in zip(scales, groups, strict=True)
        )
        self.scales = _decoder_scales(widths, decoder_convs, output_activation)

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
            x = scale(adaptive_conv(x, kernels_at(code, index), groups=groups))
        return x

    def forward(self, content_features: Tensor, style_features: Tensor) -> Tensor:
        return self.decode(content_features, self.predict(style_features))


class AdaINTransfer(nn.Module):
    """Means and deviations at relu4_1 (Huang & Belongie, ICCV 2017) and a decoder of the same shape."""

    smallest_map = 2

    def __init__(
        self,
        *,
        widths: Sequence[int],
        decoder_convs: Sequence[int],
        output_activation: Literal["none", "sigmoid"] = "none",
    ) -> None:
        super().__init__()
        self.scales = _decoder_scales(widths, decoder_convs, output_activation)

    def predict(self, style_features: Tensor) -> StyleCode:
        variance, mean = torch.var_mean(_exact(style_features), dim=(2, 3), correction=0)
        return {"mean": mean, "std": (variance + EPS).sqrt()}

    def decode(self, content_features: Tensor, code: StyleCode) -> Tensor:
        x = (
            F.instance_norm(_exact(content_features), eps=EPS) * code["std"][..., None, None]
            + code["mean"][..., None, None]
        )
        for scale in self.scales:
            x = scale(x)
        return x

    def forward(self, content_features: Tensor, style_features: Tensor) -> Tensor:
        return self.decode(content_features, self.predict(style_features))


def _exact(features: Tensor) -> Tensor:
    """For statistics: float32 at least, also under autocast."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


class StyleTransferNet(nn.Module):
    """Images in [0, 1] to images that are meant to lie there; clamp when writing."""

    def __init__(self, encoder: VGGEncoder, transfer: AdaConvTransfer | AdaINTransfer) -> None:
        super().__init__()
        self.encoder, self.transfer = encoder, transfer

    def encode_content(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) of any size -> relu4_1 of it padded to multiples of 8: (B, C4, ceil(H/8), ceil(W/8))."""
        return self.encoder.relu4_1(pad_to_stride(image, smallest_map=self.transfer.smallest_map))

    def encode_style(self, image: Tensor) -> StyleCode:
        """(B, 3, h, w) of any size -> everything that `decode` needs of it."""
        return self.transfer.predict(self.encoder.relu4_1(pad_to_stride(image, smallest_map=2)))

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


def kernels_at(code: StyleCode, index: int) -> AdaConvKernels:
    """The kernels of a scale, of which the coarsest is 0."""
    return AdaConvKernels(*(code[f"kernels.{index}.{name}"] for name in AdaConvKernels._fields))


def pad_to_stride(image: Tensor, *, smallest_map: int) -> Tensor:
    """Reflect to multiples of 8, and so far that relu4_1 has sides that reflection itself can pad."""
    for axis in (-1, -2):
        side, target = image.shape[axis], padded_side(image.shape[axis], smallest_map=smallest_map)
        if target != side:
            order = reflected(torch.arange(target, device=image.device), side)
            image = image.index_select(axis, order)
    return image


def padded_side(side: int, *, smallest_map: int) -> int:
    """Of a picture's side as the encoder sees it."""
    return max(smallest_map, -(-side // STRIDE)) * STRIDE


def reflected(index: Tensor, side: int) -> Tensor:
    """Where pixels come from that lie beyond a side: mirrored at its ends, as often as it takes."""
    index = index % max(1, 2 * side - 2)
    return torch.where(index < side, index, 2 * side - 2 - index)


def build_network(
    *,
    encoder: VGGEncoder,
    architecture: Literal["adaconv", "adain"] = "adaconv",
    descriptor_channels: int = 512,
    descriptor_size: int = 3,
    descriptor_norm: bool = True,
    style_block: Literal["conv_pool_act", "conv_act_pool"] = "conv_pool_act",
    groups: Sequence[int] = (512, 128, 32, 8),
    kernel_size: int = 3,
    predictor_padding: Literal["same", "valid"] = "same",
    predictor_padding_mode: Literal["reflect", "zeros"] = "reflect",
    identity_base: bool = True,
    decoder_convs: Sequence[int] = (1, 4, 2, 2),
    output_activation: Literal["none", "sigmoid"] = "none",
) -> StyleTransferNet:
    """The network with fresh weights from torch's generator.

    Args:
        encoder: frozen, with its weights.
        architecture: `adaconv`, or the `adain` baseline, which takes the decoder's arguments alone.
        descriptor_channels: S of the style descriptor W (paper: s_d).
        descriptor_size: its height and width (paper: s_h, s_w).
        descriptor_norm: divide W by its root mean square.
        style_block: order of convolution, pooling and leaky ReLU in the style encoder.
        groups: of the adaptive convolutions, coarsest scale first; each divides its scale's channels (paper: n_g).
        kernel_size: k of the depthwise kernels, odd (paper: k_h, k_w).
        predictor_padding: `same`: a padded 3x3 convolution over a W of k x k; `valid`: a convolution over a larger W
            that shrinks it to k x k.
        predictor_padding_mode: of `same`.
        identity_base: add the predicted kernels to a learned identity.
        decoder_convs: fixed convolutions of each scale, coarsest first.
        output_activation: after the last convolution.

    Raises:
        ValueError: groups do not divide the channels, kernels have no middle, or W does not give ones of this size.
    """
    transfer: AdaConvTransfer | AdaINTransfer
    if architecture == "adain":
        transfer = AdaINTransfer(
            widths=encoder.widths, decoder_convs=decoder_convs, output_activation=output_activation
        )
    else:
        transfer = AdaConvTransfer(
            widths=encoder.widths,
            descriptor_channels=descriptor_channels,
            descriptor_size=descriptor_size,
            descriptor_norm=descriptor_norm,
            style_block=style_block,
            groups=groups,
            kernel_size=kernel_size,
            predictor_padding=predictor_padding,
            predictor_padding_mode=predictor_padding_mode,
            identity_base=identity_base,
            decoder_convs=decoder_convs,
            output_activation=output_activation,
        )
    return StyleTransferNet(encoder, transfer)
