"""Bytes <-> PIL <-> (H, W, 3) uint8 <-> (3, H, W) float32 in [0, 1]. Value ranges change only here.

Decoding is bounded: the size is read from the header first, and only formats whose decoders are safe are recognised.
"""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from adaconv.errors import AdaConvError

if TYPE_CHECKING:  # sharding needs no torch, and a worker that does not import it starts seconds earlier
    from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_PIXELS = 40_000_000


class ImageError(AdaConvError):
    """Bytes that are no usable image; `reason` is a code for books and tables."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason


def open_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Look at the header only; nothing is decoded.

    Raises:
        ImageError: `empty`, `not_an_image` or `too_many_pixels`.
    """
    if not data:
        raise ImageError("empty", "the file has no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # bounded below, by our own limit
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", str(error)) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError("not_an_image", "no image of a known format starts here") from error
    if image.width * image.height > max_pixels:
        raise ImageError("too_many_pixels", f"{image.width}x{image.height} exceeds {max_pixels} pixels")
    return image


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An upright RGB picture of whatever was stored; transparency lies on white.

    Raises:
        ImageError: as open_header, or `truncated` where the pixels are not all there.
    """
    image = open_header(data, max_pixels=max_pixels)
    try:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError("truncated", str(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: 16 bit is scaled to 8, transparency lies on white."""
    if image.mode.startswith("I;16") or image.mode == "I":
        pixels = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((pixels / 257).round().clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        image = Image.fromarray(np.asarray(image).clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def encode_jpeg(image: Image.Image, *, quality: int) -> bytes:
    """RGB picture to JPEG without chroma subsampling."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) float32 in [0, 1]."""
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)


def to_uint8(image: Tensor) -> NDArray[np.uint8]:
    """(3, H, W) float, clamped to [0, 1] -> (H, W, 3) uint8."""
    import torch

    pixels: NDArray[np.uint8] = image.float().clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return pixels
