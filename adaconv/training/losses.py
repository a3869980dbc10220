"""Content and style losses in the encoder's feature space (Huang & Belongie, ICCV 2017), in float32."""

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
) -> dict[str, Tensor]:
    """Scalars: `loss` (weighted sum), `content_loss`, `style_loss` (unweighted).

    Args:
        output: (B, 3, H, W) stylized image.
        output_features: its relu1_1 ... relu4_1.
        content_features: relu4_1 of the content.
        style_features: relu1_1 ... relu4_1 of the style.
        content_weight: of the mean squared difference at relu4_1.
        style_weight: of the squared differences of means and deviations, averaged over channels, summed over maps.
    """
    with torch.autocast(output.device.type, enabled=False):
        content_loss = F.mse_loss(output_features[-1].float(), content_features.float())
        style_loss = output.new_zeros((), dtype=torch.float32)
        for of_output, of_style in zip(output_features, style_features, strict=True):
            for a, b in zip(_statistics(of_output), _statistics(of_style), strict=True):
                style_loss = style_loss + F.mse_loss(a, b)
        return {
            "loss": content_weight * content_loss + style_weight * style_loss,
            "content_loss": content_loss,
            "style_loss": style_loss,
        }


def _statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel: (B, C) each."""
    variance, mean = torch.var_mean(features.float(), dim=(2, 3), correction=0)
    return mean, (variance + EPS).sqrt()
