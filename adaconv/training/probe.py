"""The fixed pictures a run is watched by: the same contents and styles at every step, as one grid."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from adaconv.data.loader import SampleReader
from adaconv.data.order import stable_seed
from adaconv.data.shard_cache import ShardCache
from adaconv.data.sources import list_images, read_found
from adaconv.errors import UsageError
from adaconv.images import ImageError, as_seen, open_header, to_tensor, to_uint8
from adaconv.model.network import StyleTransferNet
from adaconv.tracking.tracker import GRID_GAP
from adaconv.training.losses import style_transfer_losses

if TYPE_CHECKING:
    from adaconv.config.model import LossConfig
    from adaconv.config.train import TrainConfig
    from adaconv.data.manifest import DatasetVersion

_MAX_PIXELS = 10**9  # a few pictures that somebody chose: cameras exceed what whole collections are held to
_LEAST_CONTRAST, _LEAST_STYLE_SPREAD = 0.1, 1 / 255


@dataclass(frozen=True)
class Look:
    """`grid`: styles in the top row, contents in the left column, stylized images where they meet, (H, W, 3) uint8.

    `metrics`: mean losses over all pairs (`probe/loss` and its parts); `probe/contrast`, the deviation of the outputs'
    pixels over the contents'; `probe/style_spread`, the mean deviation of a pixel from style to style, in [0, 1].
    """

    grid: NDArray[np.uint8]
    metrics: dict[str, float]


class Probe:
    """Contents x styles, each a square (3, S, S) float32 in [0, 1]: those of one side, the same at every look."""

    def __init__(self, contents: Sequence[Tensor], styles: Sequence[Tensor]) -> None:
        self._contents, self._styles = list(contents), list(styles)

    def look(self, network: StyleTransferNet, loss: LossConfig) -> Look:
        """What the network makes of the pictures now; for the same weights always the same."""
        device = next(network.parameters()).device
        was_training = network.training
        network.eval()
        rows = [[torch.ones_like(self._contents[0]), *self._styles]]
        sums: dict[str, float] = {}
        with torch.inference_mode():
            styles = [style[None].to(device) for style in self._styles]
            features = [network.encoder(style) for style in styles]
            codes = [network.encode_style(style) for style in styles]
            for content in self._contents:
                pixels = content[None].to(device)
                content_features = network.encoder.relu4_1(pixels)
                outputs = [network.stylize(pixels, code) for code in codes]
                for output, of_style in zip(outputs, features, strict=True):
                    losses = style_transfer_losses(
                        output,
                        network.encoder(output),
                        content_features,
                        of_style,
                        content_weight=loss.content_weight,
                        style_weight=loss.style_weight,
                        content_target=loss.content_target,
                    )
                    for name, value in losses.items():
                        sums[f"probe/{name}"] = sums.get(f"probe/{name}", 0.0) + value.item()
                rows.append([content, *(output[0].float().cpu() for output in outputs)])
        network.train(was_training)
        pairs = len(self._contents) * len(self._styles)
        metrics = {name: total / pairs for name, total in sums.items()}
        made = torch.stack([torch.stack(row[1:]) for row in rows[1:]]).clamp(0, 1)  # (contents, styles, 3, S, S)
        metrics["probe/contrast"] = _deviation(made.flatten(0, 1)) / max(_deviation(torch.stack(self._contents)), 1e-6)
        if len(styles) > 1:
            metrics["probe/style_spread"] = made.std(dim=1, correction=0).mean().item()
        return Look(tile_grid(rows), metrics)


def _deviation(images: Tensor) -> float:
    """Mean over images (n, 3, S, S) and channels of the deviation of their pixels: a picture of one colour has none."""
    return images.std(dim=(-2, -1)).mean().item()


def collapse(metrics: Mapping[str, float]) -> str | None:
    """What has gone wrong with a network whose outputs are grey, or do not depend on the style; None: nothing."""
    if metrics["probe/contrast"] < _LEAST_CONTRAST:
        return (
            f"the outputs have lost their contrast ({metrics['probe/contrast']:.2f} of the contents'): lower "
            "train.learning_rate, or raise loss.content_weight"
        )
    if metrics.get("probe/style_spread", 1) < _LEAST_STYLE_SPREAD:
        return (
            f"the outputs do not depend on the style (they differ by {255 * metrics['probe/style_spread']:.2f} of 255 "
            "levels from style to style): lower train.style_encoder_rate, or raise loss.style_weight"
        )
    return None


def tile_grid(rows: list[list[Tensor]]) -> NDArray[np.uint8]:
    """Cells (3, S, S) float in [0, 1], clamped, side by side on white: (H, W, 3) uint8."""
    side = rows[0][0].shape[-1]
    step = side + GRID_GAP
    sheet = np.full((len(rows) * step - GRID_GAP, len(rows[0]) * step - GRID_GAP, 3), 255, np.uint8)
    for down, row in enumerate(rows):
        for across, cell in enumerate(row):
            sheet[down * step : down * step + side, across * step : across * step + side] = to_uint8(cell)
    return sheet


def probe_of(
    config: TrainConfig, content: DatasetVersion, style: DatasetVersion, *, cache: ShardCache | None = None
) -> Probe:
    """The probe of a run: pictures of the folders that it names, else of its datasets.

    Raises:
        UsageError: as given_squares.
    """
    tracking, side = config.tracking, config.data.crop
    contents, styles = given_squares(config)
    return Probe(
        contents or squares_of_version(content, tracking.sample_contents, side=side, cache=cache),
        styles or squares_of_version(style, tracking.sample_styles, side=side, cache=cache),
    )


def given_squares(config: TrainConfig) -> tuple[list[Tensor] | None, list[Tensor] | None]:
    """Contents and styles of the folders that a run names for its grid.

    Raises:
        UsageError: one of them holds no images, or one that cannot be decoded.
    """
    tracking, side = config.tracking, config.data.crop
    contents, styles = (
        squares_of_folder(folder, count, side=side, flag=flag) if folder is not None else None
        for folder, count, flag in (
            (tracking.contents_from, tracking.sample_contents, "--tracking.contents-from"),
            (tracking.styles_from, tracking.sample_styles, "--tracking.styles-from"),
        )
    )
    return contents, styles


def squares_of_version(
    version: DatasetVersion, count: int, *, side: int, cache: ShardCache | None = None
) -> list[Tensor]:
    """Of the first samples in an order that depends on their keys alone: the same for every run over a dataset."""
    reader = SampleReader(version, cache=cache)
    rows = heapq.nsmallest(count, range(len(reader)), key=lambda row: stable_seed("probe", reader.key(row)))
    return [_square(reader.read(row), side) for row in rows]


def squares_of_folder(folder: str, count: int, *, side: int, flag: str) -> list[Tensor]:
    """Of the first images of a folder, local or s3://, by path; all where there are fewer.

    Raises:
        UsageError: it holds no images, or one of those cannot be decoded.
    """
    squares = []
    for found in list_images((folder,), flag=flag)[:count]:
        try:
            squares.append(_square(read_found(found), side))
        except (ImageError, OSError, SyntaxError, ValueError) as error:  # what decoders raise
            raise UsageError(f"{flag} {folder}: expected images, found {found.source}: {error}") from error
    return squares


def _square(data: bytes, side: int) -> Tensor:
    """The middle of an image, as large as its shorter side: (3, side, side) in [0, 1]."""
    picture = as_seen(open_header(data, max_pixels=_MAX_PIXELS))
    return to_tensor(ImageOps.fit(picture, (side, side), Image.Resampling.BICUBIC))
