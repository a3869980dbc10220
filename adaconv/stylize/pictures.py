"""Pictures as callers have them, and back: PIL, numpy and tensors."""

import io
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from adaconv.errors import UsageError
from adaconv.images import as_seen, to_float, to_levels, to_uint8
from adaconv.stylize.raster import Raster, Window, tiles

Picture = Image.Image | NDArray[np.uint8] | NDArray[np.float32] | Tensor
P = TypeVar("P", Image.Image, NDArray[np.uint8], NDArray[np.float32], Tensor)

_WINDOW_SIDE = 1024  # of what is reduced at a time
_LONGEST_STYLE = 8  # times as long as wide
_LEVELS = (-0.5, 1.5)  # levels in [0, 1] lie within; levels of 0 to 255, or of -1 to 1, do not


def pixels_of(picture: Picture) -> Tensor:
    """Any picture as (1, 3, H, W), uint8 or float32 in [0, 1].

    Args:
        picture: PIL of any mode, see images.as_seen; numpy (H, W, 3); a tensor (3, H, W) or (1, 3, H, W). Arrays and
            tensors are uint8, or floating in [0, 1].

    Raises:
        UsageError: another shape or dtype, or values of another scale.
    """
    if isinstance(picture, Image.Image) and min(picture.size):
        return torch.from_numpy(np.array(as_seen(picture))).permute(2, 0, 1)[None]
    tensor = picture if isinstance(picture, Tensor) else torch.empty(0)
    if isinstance(picture, np.ndarray) and picture.ndim == 3 and picture.shape[2] == 3:
        tensor = torch.from_numpy(picture.copy()).permute(2, 0, 1)
    if tensor.numel():
        tensor = tensor[None] if tensor.ndim == 3 else tensor
        if tensor.ndim == 4 and tensor.shape[:2] == (1, 3) and min(tensor.shape) > 0:
            if tensor.dtype == torch.uint8:
                return tensor
            if tensor.is_floating_point():
                return require_levels(tensor.float())
    shape = tuple(getattr(picture, "shape", getattr(picture, "size", ())))
    found = f"{type(picture).__name__} of {shape} {getattr(picture, 'dtype', '')}"
    raise UsageError(
        f"expected a PIL picture, an array (H, W, 3) or a tensor (3, H, W), uint8 or floating in [0, 1]; found {found}"
    )


def require_levels(values: Tensor) -> Tensor:
    """Floating values as they are, if they may be levels in [0, 1]: what filters make of such goes beyond by a little.

    Raises:
        UsageError: they are not finite, or of another scale.
    """
    low, high = (float(bound) for bound in values.aminmax())
    if not (_LEVELS[0] <= low and high <= _LEVELS[1]):  # a NaN is neither
        raise UsageError(
            f"expected floating values in [0, 1], found {low:.4g} to {high:.4g}; divide levels of 0 to 255 by 255, and "
            "undo a normalisation"
        )
    return values


def like(picture: P, pixels: Tensor) -> P:
    """Float pixels (1, 3, H, W), clamped to [0, 1], as the kind of picture that came in; PIL is RGB."""
    pixels = pixels.float().clamp(0, 1)
    made: Any
    if isinstance(picture, Image.Image):
        made = Image.fromarray(to_uint8(pixels[0]))
    elif isinstance(picture, Tensor):
        made = pixels if picture.ndim == 4 else pixels[0]
        made = to_levels(made) if picture.dtype == torch.uint8 else made.to(picture)
    elif picture.dtype == np.uint8:
        made = to_uint8(pixels[0])
    else:
        made = pixels[0].permute(1, 2, 0).cpu().numpy().astype(picture.dtype)
    return cast(P, made)


def reduced(raster: Raster, side: int) -> Tensor:
    """A picture as a style is read, see as_style: one that is large is never in memory as a whole.

    Returns:
        (1, 3, h, w) float32 in [0, 1].
    """
    middle, (width, height) = as_style(raster.width, raster.height, side)
    factor = max(1, min(middle.height, middle.width) // side)
    step = max(factor, _WINDOW_SIDE // factor * factor)
    rows = []
    for top in range(0, middle.height, step):
        strip = [w.moved(middle.top, middle.left) for w in tiles(middle.height, middle.width, step) if w.top == top]
        rows.append(torch.cat([_box(raster, window, factor) for window in strip], dim=-1))
    small = torch.cat(rows, dim=-2)
    size = (height, width)
    if size == tuple(small.shape[-2:]):
        return small
    return F.interpolate(small, size=size, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)


def thumbnail(image: Image.Image, *, side: int) -> bytes:
    """JPEG of at most `side` pixels a side."""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.convert("RGB").save(buffer, "JPEG", quality=75)
    return buffer.getvalue()


def side_by_side(thumbnails: Sequence[bytes], shares: Sequence[float]) -> bytes:
    """A thumbnail of several: a strip of the middle of each, as wide as its share; nothing where there are none."""
    shown = [
        (Image.open(io.BytesIO(data)), share) for data, share in zip(thumbnails, shares, strict=True) if data and share
    ]
    if len(shown) < 2:
        return next((data for data, share in zip(thumbnails, shares, strict=True) if data and share), b"")
    side = max(max(image.size) for image, _ in shown)
    total, canvas, left = sum(share for _, share in shown), Image.new("RGB", (side, side)), 0.0
    for image, share in shown:
        right = left + share / total
        width = round(right * side) - round(left * side)
        if width:
            canvas.paste(ImageOps.fit(image, (width, side)), (round(left * side), 0))
        left = right
    return thumbnail(canvas, side=side)


def shrink(image: Image.Image, side: int | None) -> Image.Image:
    """Scaled down until the shorter side has `side` pixels; never enlarged."""
    if side is None or min(image.size) <= side:
        return image
    return image.resize(scaled(image.size, side), Image.Resampling.LANCZOS)


def as_style(width: int, height: int, side: int) -> tuple[Window, tuple[int, int]]:
    """What is read of a style, and the width and height to which that is scaled: `side` is the shorter one.

    Of a strip more than 8 times as long as wide it is the middle: the whole of 1500x1 would be 384,000 pixels wide.
    """
    wide, high = min(width, _LONGEST_STYLE * height), min(height, _LONGEST_STYLE * width)
    middle = Window(0, high, 0, wide).moved((height - high) // 2, (width - wide) // 2)
    return middle, scaled((wide, high), side)


def scaled(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height with a shorter side of `side`."""
    short = min(size)
    return max(1, round(size[0] * side / short)), max(1, round(size[1] * side / short))


def _box(raster: Raster, window: Window, factor: int) -> Tensor:
    return F.avg_pool2d(to_float(raster.read(window)), factor, ceil_mode=True)
