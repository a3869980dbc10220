"""What is measured of an output, its content and its style. Lower is better for each.

content     mean squared difference of relu4_1 from the content's (Gatys et al., CVPR 2016)
structure   difference from the content in which places look alike: self-similarity (Kolkin et al., CVPR 2019) of
            relu3_1 without its mean, 0 to 2
style       squared differences of channels' means and deviations from the style's, summed over relu1_1 ... relu4_1, as
            in training (Huang & Belongie, ICCV 2017)
gram        squared difference of Gram matrices from the style's (Gatys et al.), over the sum of both matrices' squares,
            mean over relu1_1 ... relu4_1, 0 to 1
colour      sliced Wasserstein-1 distance of colours, output and style, over 16 directions of RGB, 0 to 1
identity    root mean squared difference of a content that is drawn in its own style from itself, 0 to 1

The judge is an encoder of its own, the same for all models: one that models brought along would favour each its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from adaconv.model.encoder import VGGEncoder
from adaconv.training.losses import channel_statistics

OF_PAIRS = ("content", "structure", "style", "gram", "colour")
METRICS = (*OF_PAIRS, "identity")
VERSION = 2  # of the definitions: scores of others cannot be compared

_PLACES_SIDE = 32  # of a side of the map whose places are compared, all with all
_DIRECTIONS, _QUANTILES, _COLOURS_SIDE = 16, 256, 256
_TINY = 1e-12


@dataclass(frozen=True)
class Look:
    """What a picture is compared by: `relu4_1`, (1, C, H, W); how much its places are `alike`, (P, P); of each tap
    `statistics`, (1, C) twice, and a Gram matrix, (C, C); its `colours`, (16, 256).
    """

    relu4_1: Tensor
    alike: Tensor
    statistics: tuple[tuple[Tensor, Tensor], ...]
    grams: tuple[Tensor, ...]
    colours: Tensor

    def as_style(self) -> Look:
        """Without what only contents are compared by, which takes most of its memory."""
        nothing = self.alike.new_empty(0)
        return replace(self, relu4_1=nothing, alike=nothing)


class Judge:
    """Looks at pictures, (1, 3, H, W) float32 in [0, 1] on the encoder's device."""

    def __init__(self, encoder: VGGEncoder) -> None:
        self._encoder = encoder.eval()

    @torch.inference_mode()
    def look(self, picture: Tensor) -> Look:
        features = self._encoder(picture)
        return Look(
            features[-1],
            _alike(features[2]),
            tuple(channel_statistics(one) for one in features),
            tuple(_gram(one) for one in features),
            _colours(picture),
        )


@torch.inference_mode()
def compare(output: Look, content: Look, style: Look) -> dict[str, float]:
    """The metrics of a pair; not finite where the output is not."""
    of_style = [
        F.mse_loss(have, want)
        for pair in zip(output.statistics, style.statistics, strict=True)
        for have, want in zip(*pair, strict=True)
    ]
    grams = [
        (have - want).square().sum() / (have.square().sum() + want.square().sum()).clamp_min(_TINY)
        for have, want in zip(output.grams, style.grams, strict=True)
    ]
    return {
        "content": F.mse_loss(output.relu4_1, content.relu4_1).item(),
        "structure": (output.alike - content.alike).abs().sum(dim=0).mean().item(),
        "style": torch.stack(of_style).sum().item(),
        "gram": torch.stack(grams).mean().item(),
        "colour": (output.colours - style.colours).abs().mean().item(),
    }


def identity(output: Tensor, content: Tensor) -> float:
    """Of a content (1, 3, H, W) in [0, 1] and what it becomes in its own style."""
    return math.sqrt(F.mse_loss(output, content).item())


def _alike(features: Tensor) -> Tensor:
    """Cosine distances of all places of a map (1, C, H, W) to one another, each column divided by its sum: (P, P)."""
    height, width = features.shape[-2:]
    pooled = F.adaptive_avg_pool2d(features, (min(height, _PLACES_SIDE), min(width, _PLACES_SIDE)))
    places = pooled.flatten(2)[0].T  # (P, C)
    places = F.normalize(places - places.mean(dim=0), dim=1)  # what all places share tells none from another
    distances = (1 - places @ places.T).clamp_min(0)
    return distances / distances.sum(dim=0, keepdim=True).clamp_min(_TINY)


def _gram(features: Tensor) -> Tensor:
    channels = features.flatten(2)[0]
    return channels @ channels.T / channels.shape[1]


def _colours(picture: Tensor) -> Tensor:
    """Quantiles of a picture's colours along directions of RGB, each scaled to a range of 1: (16, 256)."""
    values = picture[0, :, *_some_places(*picture.shape[-2:])].flatten(1)  # (3, pixels)
    along = (_directions(values) @ values).sort(dim=1).values
    places = torch.linspace(0, along.shape[1] - 1, _QUANTILES, device=along.device).round().long()
    return along[:, places]


def _some_places(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of pixels, at most 256 a side, (h, w) each: to sort all of them takes as long as the encoder.

    One of each block, anywhere in it but always the same: those of a grid would see one phase of a fine pattern, such
    as upsampling leaves.
    """
    every = math.ceil(max(height, width) / _COLOURS_SIDE)
    down, across = math.ceil(height / every), math.ceil(width / every)
    within = torch.randint(every, (2, down, across), generator=torch.Generator().manual_seed(0))
    rows = torch.arange(down)[:, None] * every + within[0]
    columns = torch.arange(across) * every + within[1]
    return rows.clamp(max=height - 1), columns.clamp(max=width - 1)


def _directions(like: Tensor) -> Tensor:
    """(16, 3): red, green, blue, light, and others spread over the sphere by the golden angle; absolute sum 1."""
    count = _DIRECTIONS - 4
    z = 1 - (2 * torch.arange(count) + 1) / count
    angle = math.pi * (3 - math.sqrt(5)) * torch.arange(count)
    radius = (1 - z.square()).sqrt()
    others = torch.stack([radius * angle.cos(), radius * angle.sin(), z], dim=1)
    all_of_them = torch.cat([torch.eye(3), torch.ones(1, 3), others])
    return (all_of_them / all_of_them.abs().sum(dim=1, keepdim=True)).to(like)
