"""Content and style losses in the encoder's feature space (Huang & Belongie, ICCV 2017), and two in pixels; float32."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-5  # inside the root: the gradient of the root of a zero variance is not finite


def style_transfer_losses(
    output: Tensor,
    output_features: Sequence[Tensor],
    content_features: Tensor,
    style_features: Sequence[Tensor],
    *,
    content_weight: float,
    style_weight: float,
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
        style_weight: of the squared differences of means and deviations, averaged over channels, summed over maps.
        identity: (n, 3, H, W) images in [0, 1], each stylized with itself, and the images: `identity_loss`.
        identity_weight: of their mean squared difference (Park & Lee, CVPR 2019, the first term of equation 9).
        tv_weight: of the mean absolute difference of neighbouring pixels of the output, `tv_loss`; 0 leaves it out.
    """
    with torch.autocast(output.device.type, enabled=False):
        content_loss = F.mse_loss(output_features[-1].float(), content_features.float())
        style_loss = output.new_zeros((), dtype=torch.float32)
        for of_output, of_style in zip(output_features, style_features, strict=True):
            for a, b in zip(_statistics(of_output), _statistics(of_style), strict=True):
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


def _total_variation(image: Tensor) -> Tensor:
    across, down = image[..., :, 1:] - image[..., :, :-1], image[..., 1:, :] - image[..., :-1, :]
    return across.abs().mean() + down.abs().mean()


def _statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel: (B, C) each."""
    variance, mean = torch.var_mean(features.float(), dim=(2, 3), correction=0)
    return mean, (variance + EPS).sqrt()
