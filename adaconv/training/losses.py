"""Content and style losses in the encoder's feature space (Huang & Belongie, ICCV 2017), and two in pixels; float32."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from adaconv.model import gpu

EPS = 1e-5  # inside the root: the gradient of the root of a zero variance is not finite


def style_transfer_losses(
    output: Tensor,
    output_features: Sequence[Tensor],
    content_features: Tensor,
    style_features: Sequence[Tensor],
    *,
    content_weight: float,
    style_weight: float,
    content_target: Literal["raw", "normalised"] = "raw",
    identity: tuple[Tensor, Tensor] | None = None,
    identity_weight: float = 0.0,
    tv_weight: float = 0.0,
) -> dict[str, Tensor]:
    """Scalars: `loss` (weighted sum) and its parts unweighted, `content_loss`, `style_loss` and those asked for.

    Args:
        output: (B, 3, H, W) stylized image.
        output_features: its relu1_1 ... relu4_1.
        content_features: relu4_1 of the content.
        style_features: relu1_1 ... relu4_1 of the style.
        content_weight: of the mean squared difference at relu4_1.
        style_weight: of the squared differences of means and deviations, averaged over channels, summed over maps: four
            times the weight of implementations that average over maps.
        content_target: compare relu4_1 as it is, as the AdaConv implementations do, or instance-normalised: raw
            features also hold the means and deviations that the style loss asks to change.
        identity: (n, 3, H, W) images in [0, 1], each stylized with itself, and the images: `identity_loss`.
        identity_weight: of their mean squared difference (Park & Lee, CVPR 2019, the first term of equation 9).
        tv_weight: of the mean absolute difference of neighbouring pixels of the output, `tv_loss`; 0 leaves it out.
    """
    with torch.autocast(output.device.type, enabled=False):
        content_loss = _squared_difference(
            _content(output_features[-1].float(), content_target), _content(content_features.float(), content_target)
        )
        style_loss = output.new_zeros((), dtype=torch.float32)
        for of_output, of_style in zip(output_features, style_features, strict=True):
            for a, b in zip(channel_statistics(of_output), channel_statistics(of_style), strict=True):
                style_loss = style_loss + F.mse_loss(a, b)
        losses = {"content_loss": content_loss, "style_loss": style_loss}
        loss = content_weight * content_loss + style_weight * style_loss
        if identity is not None:
            losses["identity_loss"] = F.mse_loss(identity[0].float(), identity[1].float())
            loss = loss + identity_weight * losses["identity_loss"]
        if tv_weight:
            losses["tv_loss"] = _total_variation(output.float())
            loss = loss + tv_weight * losses["tv_loss"]
        return {"loss": loss, **losses}


def _squared_difference(a: Tensor, b: Tensor) -> Tensor:
    """The mean of it. On GPUs mse_loss's gradient gives up channels_last."""
    return (a - b).square().mean() if a.is_cuda else F.mse_loss(a, b)


def _content(features: Tensor, target: Literal["raw", "normalised"]) -> Tensor:
    return F.instance_norm(features, eps=EPS) if target == "normalised" else features


def _total_variation(image: Tensor) -> Tensor:
    across, down = image[..., :, 1:] - image[..., :, :-1], image[..., 1:, :] - image[..., :-1, :]
    return across.abs().mean() + down.abs().mean()


def channel_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel: (B, C) each, float32."""
    if torch.compiler.is_compiling():  # a compiler joins the passes by itself
        variance, mean = torch.var_mean(features.float(), dim=(2, 3), correction=0)
        return mean, (variance + EPS).sqrt()
    mean, std = _ChannelStatistics.apply(features)  # type: ignore[no-untyped-call]
    return mean.float(), std.float()


class _ChannelStatistics(torch.autograd.Function):
    """Mean and deviation of a map's channels, with a gradient of one pass over the map.

    On CPUs torch's var_mean goes value by value, and its gradient takes several passes: together 7 times as long as
    these. The variance is taken of centred values: E[x²] - E[x]² would lose its digits.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(features.dtype, torch.float32)
        ctx.on_gpu = gpu.maps is not None and gpu.maps.suits(features)
        if ctx.on_gpu:
            mean, variance = gpu.maps.statistics(features)
        elif features.is_cuda:
            variance, mean = torch.var_mean(features.to(wide), dim=(2, 3), correction=0)
        else:
            mean = features.mean(dim=(2, 3), dtype=wide)
            variance = (features - mean[..., None, None]).square_().mean(dim=(2, 3))
        std = (variance + EPS).sqrt()
        ctx.save_for_backward(features, mean, std)
        return mean, std

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean: Tensor, of_std: Tensor) -> Tensor:
        features, mean, std = ctx.saved_tensors
        values = features.shape[2] * features.shape[3]
        # d mean / d x = 1 / n, and d std / d x = (x - mean) / (n * std): a slope and a constant for each channel.
        slope = of_std / (values * std)
        constant = of_mean / values - slope * mean
        if ctx.on_gpu:
            fused: Tensor = gpu.maps.affine(features, slope, constant)
            return fused
        # In the statistics' dtype: rounded before they are added up, they would leave an offset all over the map.
        gradient = torch.addcmul(constant[..., None, None], features.to(slope.dtype), slope[..., None, None])
        return gradient.to(features.dtype)
