"""Keep the content's colours: its chroma under the stylized luminance, or its colour statistics (CORAL)."""

from typing import Literal

import torch
from torch import Tensor

Color = Literal["style", "luminance", "coral"]

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as JPEG's
_EPS = 1e-5  # on variances of channels in [0, 1]: what is nearly grey is not blown up


def with_chroma_of(content: Tensor, stylized: Tensor) -> Tensor:
    """The stylized luminance with the content's chroma.

    Args:
        content: (B, 3, h, w) in [0, 1].
        stylized: the same shape.

    Returns:
        the same shape; clamped to [0, 1], for not every luminance exists in every chroma.
    """
    weights = torch.tensor(_LUMA, device=content.device).view(1, 3, 1, 1)
    luma_of_content = (content * weights).sum(1, keepdim=True)
    luma = (stylized.clamp(0, 1) * weights).sum(1, keepdim=True)
    # Chroma is what is left of a colour without its luminance: adding the new one replaces it.
    return (content - luma_of_content + luma).clamp(0, 1)


class ColorStatistics:
    """Mean and covariance of colours over windows that were added, in float64."""

    def __init__(self) -> None:
        self._count = 0
        self._sum = torch.zeros(3, dtype=torch.float64)
        self._products = torch.zeros(3, 3, dtype=torch.float64)

    def add(self, window: Tensor) -> None:
        """(1, 3, h, w) in [0, 1]."""
        colours = window[0].clamp(0, 1).double().flatten(1)
        self._count += colours.shape[1]
        self._sum += colours.sum(1).cpu()
        self._products += (colours @ colours.T).cpu()

    @property
    def mean(self) -> Tensor:
        return self._sum / self._count

    @property
    def covariance(self) -> Tensor:
        return self._products / self._count - self.mean[:, None] * self.mean + _EPS * torch.eye(3, dtype=torch.float64)


def coral(window: Tensor, *, have: ColorStatistics, want: ColorStatistics) -> Tensor:
    """Colours of one mean and covariance to those of another (Sun, Feng & Saenko 2016).

    Args:
        window: (1, 3, h, w) of a picture with the statistics `have`.
        have: of the whole picture.
        want: of the picture whose colours it gets.

    Returns:
        (1, 3, h, w), clamped to [0, 1].
    """
    matrix = _power(want.covariance, 0.5) @ _power(have.covariance, -0.5)
    shift = want.mean - matrix @ have.mean
    colours = torch.einsum("ij,bjhw->bihw", matrix.float().to(window.device), window.float().clamp(0, 1))
    return (colours + shift.float().to(window.device).view(1, 3, 1, 1)).clamp(0, 1)


def _power(symmetric: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    result: Tensor = vectors @ torch.diag(values.pow(exponent)) @ vectors.T
    return result
