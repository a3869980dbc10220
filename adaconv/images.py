"""Bytes <-> PIL <-> (H, W, 3) uint8 <-> (3, H, W) float32 in [0, 1]. Value ranges change only here.

Decoding is bounded: the size is read from the header first, and only formats whose decoders are safe are recognised.
"""

from __future__ import annotations

import contextlib
import io
import re
import threading
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from adaconv.errors import AdaConvError

if TYPE_CHECKING:  # sharding needs no torch, and a worker that does not import it starts seconds earlier
    from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
EXTENSIONS = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
RGB_MODES = ("RGB", "RGBA", "P")  # whose pixels an RGB profile describes
MAX_PIXELS = 40_000_000
_PILLOWS_LIMIT = threading.Lock()
ORIENTATION = 0x0112  # the tag of EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TELL_ORIENTATION = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # in Pillow's `info`
_SCAN, _END = b"\xda", b"\xff\xd9"  # a JPEG's markers of its pixels, and of what ends them
_NO_SEGMENT = (b"", b"\x00", b"\xff")  # behind an \xff: neither begins one
# From a run's first zero on, and the whole run or nothing: trying each zero of a hole of a megabyte takes hours.
_PADDING = re.compile(rb"(?:(?<=\xff\x00)|(?<![\xff\x00]))\x00++\xff+\xd9")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"BM", b"GIF8", b"II*\0", b"MM\0*")


class ImageError(AdaConvError):
    """Bytes that are no usable image; `reason` is a code for books and tables."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason


def open_header(data: bytes | Path, *, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
    """Look at the header only, of bytes or of a file; nothing is decoded. `max_pixels` None admits any size.

    Raises:
        ImageError: `empty`, `not_an_image`, `damaged_header` or `too_many_pixels`.
    """
    if not (data if isinstance(data, bytes) else data.stat().st_size):
        raise ImageError("empty", "the file has no bytes")
    try:
        with _no_limit():
            image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS)
    except (OSError, SyntaxError, ValueError) as error:
        if _start_of(data).startswith(_MAGIC):
            raise ImageError("damaged_header", "it starts like an image and does not go on like one") from error
        raise ImageError("not_an_image", "no image of a known format starts here") from error
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise ImageError("too_many_pixels", f"{image.width}x{image.height} exceeds {max_pixels} pixels")
    return image


@contextlib.contextmanager
def _no_limit() -> Iterator[None]:
    """Pillow's own limit of 179 megapixels, a global of the process, gives way to the caller's; it does not warn."""
    with _PILLOWS_LIMIT, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged EXIF and the like
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _start_of(data: bytes | Path) -> bytes:
    if isinstance(data, bytes):
        return data
    with data.open("rb") as file:
        return file.read(8)


def require_sound_jpeg(path: Path) -> None:
    """Refuse a JPEG with missing pixels, which libjpeg makes up: Pillow hears no warning of it, libvips not every one.

    It is decoded at an eighth of its size, which takes a file's bytes and little more. Other formats pass.

    Raises:
        ImageError: `truncated` or `corrupt_data`.
    """
    with open_header(path, max_pixels=None) as image:
        if image.format not in ("JPEG", "MPO"):
            return
        data = path.read_bytes()
        colours: Literal["CMYK", "GRAY"] = "CMYK" if image.mode == "CMYK" else "GRAY"
        image.draft("L", (1, 1))
        try:
            image.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise ImageError("truncated", str(error)) from error
    decode_jpeg(data, colours, at_least=(1, 1))


def decode_jpeg(
    data: bytes, colours: Literal["RGB", "GRAY", "CMYK"], *, at_least: tuple[int, int]
) -> tuple[NDArray[np.uint8] | None, bool]:
    """A JPEG's pixels, bit-equal to Pillow's and in less time, and strict where Pillow hears no warning.

    Args:
        data: the file's bytes.
        colours: of the result; CMYK of such a JPEG alone.
        at_least: width and height that may be given instead of the stored ones.

    Returns:
        the pixels, (H, W, 1, 3 or 4) uint8, None for a kind of JPEG that this decoder does not know; and whether bytes
        had to be left out that are of no segment.

    Raises:
        ImageError: `truncated` or `corrupt_data`: libjpeg would make up pixels.
    """
    import simplejpeg  # which a bare GPU machine need not have: pictures come there as tensors

    def decoded(whole: bytes) -> NDArray[np.uint8]:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            whole,
            colours,
            min_width=at_least[0],
            min_height=at_least[1],
            min_factor=2,  # smaller ones take longer than they save
        )
        return pixels

    try:
        return decoded(data), False
    except ValueError as error:
        message = str(error)
    if "extraneous bytes" in message:
        for mended in _without_stray_bytes(data):
            try:
                return decoded(mended), True
            except ValueError as error:
                message = str(error)
    if message.startswith("Premature end"):
        raise ImageError("truncated", message)
    if message.startswith("Corrupt JPEG data"):
        raise ImageError("corrupt_data", message)
    return None, False


def _without_stray_bytes(data: bytes) -> Iterator[bytes]:
    """A JPEG without what lies between its segments, where nothing reads it; then without zeros behind its scan, too.

    libjpeg warns of such bytes in the same words as of what is left over where a damaged scan ended early.
    """
    segments, place = [data[:2]], 2
    while (place := data.find(b"\xff", place)) >= 0:
        marker, start = data[place + 1 : place + 2], place
        if marker in _NO_SEGMENT:
            place += 1
            continue
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
        segments.append(data[start:place])
        if marker == _SCAN:
            break
    head, scan = b"".join(segments), data[place:]
    yield head + scan
    for own in (b"", b"\x00"):  # many a scan ends with a byte of zeros
        yield head + _PADDING.sub(own + _END, scan)


def decode(data: bytes, *, max_pixels: int | None = MAX_PIXELS, keep_colours: bool = False) -> Image.Image:
    """An upright RGB picture in sRGB of whatever was stored; transparency lies on white.

    Args:
        data: the file's bytes.
        max_pixels: more are refused by the header; None admits any size.
        keep_colours: leave the colours in those of its RGB profile.

    Raises:
        ImageError: as open_header, or `truncated` where the pixels are not all there.
    """
    image = open_header(data, max_pixels=max_pixels)
    try:
        picture = as_seen(image, keep_colours=keep_colours)
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError("truncated", str(error)) from error
    picture.info.clear()  # all that it said has been done
    return picture


def as_seen(image: Image.Image, *, keep_colours: bool = False) -> Image.Image:
    """What a viewer shows: an upright RGB picture in sRGB, transparency on white.

    Args:
        image: of any mode; it stays what it is.
        keep_colours: leave the colours in those of its RGB profile.
    """
    picture = upright(image)
    profile = picture.info.get("icc_profile")
    if profile and not is_srgb(profile) and not (keep_colours and picture.mode in RGB_MODES):
        with contextlib.suppress(ValueError):  # a profile that cannot be read says nothing
            picture = to_srgb(picture)
    return to_rgb(picture)


def upright(image: Image.Image) -> Image.Image:
    """A picture as its EXIF says that it lies; it then has none. EXIF that cannot be read says nothing.

    Pillow's own exif_transpose writes the rest of the EXIF anew, and fails where a single field is of a wrong type.
    """
    xmp = image.info.pop("xmp", None)
    image.load()  # which turns a TIFF by itself, by its XMP too
    image.info |= {"xmp": xmp} if xmp else {}
    try:
        turn = _TURNS.get(orientation_of(image))
    except Exception:  # EXIF is written by anything that ever touched a photograph
        return image
    if turn is None:
        return image
    turned = image.transpose(turn)
    for name in _TELL_ORIENTATION:
        turned.info.pop(name, None)
    return turned


def orientation_of(image: Image.Image) -> int:
    """What EXIF says of how a picture lies, 1 where it says nothing; anything else that says it, no viewer asks.

    Pillow's own getexif asks XMP, and in PNG a text of ImageMagick's. It may raise whatever a damaged EXIF leads to.
    """
    bare = Image.Image()
    bare.info = {"exif": image.info.get("exif", b"")}
    orientation: int = bare.getexif().get(ORIENTATION, 1)
    return orientation


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: 16 bit is scaled to 8, transparency lies on white.

    32-bit integers and floats do not say what white is. Here it is 65,535, or 255 where no value is above; for floats
    255, or 1 where no value is above.
    """
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        pixels = np.nan_to_num(np.asarray(image, dtype=np.float64))
        if image.mode == "F":
            whitest = 1 if pixels.max() <= 1 else 255
        else:
            whitest = 255 if image.mode == "I" and pixels.max() <= 255 else 65535
        image = Image.fromarray((pixels * (255 / whitest)).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def is_srgb(profile: bytes) -> bool:
    """Whether an ICC profile is sRGB by its own description: most are, and converting them would change nothing."""
    try:
        return "srgb" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).lower()
    except (ImageCms.PyCMSError, OSError):
        return False


def to_srgb(image: Image.Image) -> Image.Image:
    """Colours of another profile as sRGB (relative colorimetric, black point compensated); alpha stays.

    Raises:
        ValueError: the profile cannot be read or is not one of the image's mode.
    """
    profile, alpha = image.info["icc_profile"], None
    if image.mode == "PA" or "transparency" in image.info:
        image = image.convert("LA" if image.mode == "L" else "RGBA")
    elif image.mode == "P":
        image = image.convert("RGB")
    if image.mode == "LA":  # which no transform takes
        image, alpha = image.split()
    try:
        converted = ImageCms.applyTransform(image, _to_srgb_transform(profile, image.mode))
    except (ImageCms.PyCMSError, OSError) as error:
        raise ValueError(f"its ICC profile does not fit: {error}") from error
    assert converted is not None
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def fits(profile: bytes, mode: str) -> bool:
    """Whether an ICC profile is one of a mode's colours."""
    try:
        return bool(_to_srgb_transform(profile, mode))
    except (ImageCms.PyCMSError, OSError):
        return False


@lru_cache(maxsize=16)
def _to_srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        mode,
        "RGBA" if mode == "RGBA" else "RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )


def libvips() -> Any:
    """The module pyvips; it brings a library of 40 MB that many a process does not need."""
    import pyvips

    pyvips.cache_set_max(0)  # of results, each of which keeps its pictures
    return pyvips


def scale_down(pixels: NDArray[np.uint8], width: int, height: int, *, kernel: str) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 to height x width, the same bytes on every machine, at a third of the time that Pillow takes.

    Args:
        pixels: of a picture that is as large or larger.
        width: of the result.
        height: of the result.
        kernel: of libvips: `linear`, `cubic` or `lanczos3`, each widened by the factor.
    """
    vips = libvips()
    image = vips.Image.new_from_memory(pixels.data, pixels.shape[1], pixels.shape[0], 3, "uchar").copy()
    image.set_type(vips.GValue.gint_type, "concurrency", 1)  # tasks share the machine, not the threads within one
    small = image.resize(width / pixels.shape[1], vscale=height / pixels.shape[0], kernel=kernel)
    assert (small.width, small.height) == (width, height)
    return np.frombuffer(small.write_to_memory(), np.uint8).reshape(height, width, 3)


def encode_jpeg(image: Image.Image, *, quality: int) -> bytes:
    """RGB picture to JPEG without chroma subsampling."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) float32 in [0, 1]."""
    import torch

    return to_float(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def to_float(values: Tensor) -> Tensor:
    """uint8 levels, or floating values in [0, 1], of any shape -> float32 in [0, 1]."""
    import torch

    return values.float().div_(255) if values.dtype == torch.uint8 else values.float()


def to_levels(values: Tensor) -> Tensor:
    """Floating values of any shape, clamped to [0, 1] -> uint8 levels."""
    import torch

    return values.float().clamp(0, 1).mul(255).round().to(torch.uint8)


def to_uint8(image: Tensor) -> NDArray[np.uint8]:
    """(3, H, W) float of any device, clamped to [0, 1] -> (H, W, 3) uint8."""
    levels = to_levels(image).permute(1, 2, 0)
    pixels: NDArray[np.uint8] = levels.contiguous().cpu().numpy()  # a quarter of the bytes travel from a GPU
    return pixels
