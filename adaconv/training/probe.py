"""The fixed pictures a run is watched by: the same contents and styles at every step, as one grid."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaconv.data.loader import Geometry, SampleReader, decode_crop
from adaconv.data.order import stable_seed
from adaconv.model.network import StyleTransferNet

if TYPE_CHECKING:
    from adaconv.data.manifest import DatasetVersion

_GAP = 4  # pixels of white between cells


class Probe:
    """`contents` x `styles` of the first samples by key order of a hash: the same for every run over these datasets."""

    def __init__(
        self, content: DatasetVersion, style: DatasetVersion, *, contents: int, styles: int, side: int
    ) -> None:
        self._contents = _first_by_hash(content, contents, side)
        self._styles = _first_by_hash(style, styles, side)

    def grid(self, network: StyleTransferNet) -> NDArray[np.uint8]:
        """Styles in the top row, contents in the left column, stylized images where they meet: (H, W, 3) uint8."""
        device = next(network.parameters()).device
        was_training = network.training
        network.eval()
        with torch.inference_mode():
            codes = [network.encode_style(style[None].to(device)) for style in self._styles]
            rows = [[torch.ones_like(self._contents[0]), *self._styles]]
            for content in self._contents:
                pixels = content[None].to(device)
                rows.append([content, *(network.stylize(pixels, code)[0].cpu() for code in codes)])
        network.train(was_training)
        return tile_grid(rows)


def tile_grid(rows: list[list[Tensor]]) -> NDArray[np.uint8]:
    """Cells (3, S, S) float in [0, 1], clamped, side by side on white: (H, W, 3) uint8."""
    side = rows[0][0].shape[-1]
    step = side + _GAP
    sheet = np.full((len(rows) * step - _GAP, len(rows[0]) * step - _GAP, 3), 255, np.uint8)
    for down, row in enumerate(rows):
        for across, cell in enumerate(row):
            pixels = cell.float().clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            sheet[down * step : down * step + side, across * step : across * step + side] = pixels
    return sheet


def _first_by_hash(version: DatasetVersion, count: int, side: int) -> list[Tensor]:
    """Centre squares of the first samples in an order that depends on their keys alone: (3, side, side) in [0, 1]."""
    reader = SampleReader(version)
    rows = sorted(range(len(reader.keys)), key=lambda row: stable_seed("probe", reader.keys[row]))[:count]
    geometry = Geometry(resize=side, crop=side, flip=False)
    crops = [decode_crop(reader.read(row), geometry, random.Random(0)) for row in rows]
    return [torch.from_numpy(crop.copy()).permute(2, 0, 1).float().div_(255) for crop in crops]
