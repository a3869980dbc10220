"""Sample grids whose every cell can be told apart."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

GAP = 4


def grid_of(contents: int, styles: int, *, side: int, step: int, noise: int = 0) -> NDArray[np.uint8]:
    """As the probe draws it: styles on top, contents on the left. A cell's colour says its row, column and step."""
    cell = side + GAP
    sheet = Image.new("RGB", ((styles + 1) * cell - GAP, (contents + 1) * cell - GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for row in range(contents + 1):
        for column in range(styles + 1):
            if row or column:
                left, top = column * cell, row * cell
                draw.rectangle((left, top, left + side - 1, top + side - 1), fill=colour_of(row, column, step))
    pixels = np.asarray(sheet).copy()
    if noise:
        rough = np.random.default_rng(step).integers(-noise, noise + 1, pixels.shape)
        pixels = np.clip(pixels + rough, 0, 255).astype(np.uint8)
    return pixels


def colour_of(row: int, column: int, step: int) -> tuple[int, int, int]:
    shade = 0 if 0 in (row, column) else step // 10 % 256
    return 25 * row % 256, 25 * column % 256, shade
