"""One image: (bytes, recipe) -> sample or refusal. Pure functions, whatever machine they run on.

repairs      exif_orientation, exif_invalid, first_frame, icc_profile, icc_unreadable, mode_<mode>,
             stray_bytes, wrong_extension
refusals     by the header: empty, not_an_image, damaged_header, too_many_pixels, too_thin, too_small
             by the pixels: truncated, corrupt_data, transparent, decoder_error
             by whoever reads the file: see sources.read_found
             by whoever runs the decoder: decoder_crashed, see isolation
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import PIL
import pyarrow
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, features

from adaconv.config.shard import RecipeConfig
from adaconv.errors import DatasetError
from adaconv.images import (
    ORIENTATION,
    ImageError,
    decode,
    decode_jpeg,
    encode_jpeg,
    is_srgb,
    libvips,
    open_header,
    orientation_of,
    scale_down,
    to_rgb,
    to_srgb,
    upright,
)

_JPEG = (".jpg", ".jpeg", ".jfif")
_EXTENSIONS = {"JPEG": _JPEG, "MPO": _JPEG, "TIFF": (".tif", ".tiff")}
_CODECS = ("jpg", "libjpeg_turbo", "webp", "zlib", "libtiff", "littlecms2")
# Of whoever reads: the file may be another one the next time, though its listing is the same.
MENDABLE = frozenset(("changed", "crc_mismatch", "deflate_error", "unreadable", "vanished"))
_THUMBNAIL_SIDE = 96
_SHOWN_THOUGH_REFUSED = ("too_small", "too_thin", "transparent")
_HASH = 2  # of perceptual_hash: with each change of what it gives this is the next number
_RULES = 2  # by which images are repaired and refused: as the line above
_HASH_SIDE, _HASH_FREQUENCIES = 32, 8
_HASH_SAMPLES = 128  # of the shorter side: what is left of it is between these and twice as many pixels
_HASH_DECODED = 52  # pixels of the shorter side at least: an eighth of most of COCO's


@dataclass(frozen=True)
class Header:
    """Size as the header tells it: before any orientation is applied, but for TIFF."""

    width: int
    height: int


@dataclass(frozen=True)
class Sample:
    """What lies in a shard for an image.

    `jpeg` has width x height pixels; `repairs` names what was changed besides the size; `phash`: see perceptual_hash.
    """

    jpeg: bytes
    width: int
    height: int
    repairs: tuple[str, ...]
    phash: int


@dataclass(frozen=True)
class Refusal:
    """Why an image is in no shard: a code, a sentence, and a small JPEG of it where it can be shown."""

    reason: str
    detail: str
    thumbnail: bytes | None = None


def key_of(sha256: str) -> str:
    """Name of a sample: half the hex digits of its source's sha256. No dots: WebDataset splits names there."""
    return sha256[:32]


def stored_size(width: int, height: int, recipe: RecipeConfig) -> tuple[int, int]:
    """Width and height after scaling down to the recipe's shorter side; nothing is enlarged."""
    short = min(width, height)
    if short <= recipe.short_side:
        return width, height
    return round(width * recipe.short_side / short), round(height * recipe.short_side / short)


def recipe_of(config: RecipeConfig) -> dict[str, Any]:
    """All that determines the bytes of a version besides the images: settings, and the versions of the codecs."""
    codecs = {name: features.version(name) for name in _CODECS}
    codecs |= {"pillow": PIL.__version__, "simplejpeg": simplejpeg.__version__, "pyarrow": pyarrow.__version__}
    codecs["libvips"] = ".".join(str(libvips().version(part)) for part in range(3))
    return {**config.model_dump(mode="json"), "codecs": codecs, "phash": _HASH, "rules": _RULES}


def settings_of(recipe: Mapping[str, Any]) -> RecipeConfig:
    """The settings within a version's recipe, which holds versions of codecs besides."""
    return RecipeConfig.model_validate({name: recipe[name] for name in RecipeConfig.model_fields})


def check_hashes(recipe: Mapping[str, Any], *, of: str) -> None:
    """Refuse to work with pictures that were hashed by another release: the same ones would seem to differ.

    Args:
        recipe: of a version or build.
        of: what that is, for the message.

    Raises:
        DatasetError: it was made by another release.
    """
    if recipe.get("phash") != _HASH:
        raise DatasetError(
            f"{of}: expected perceptual hashes of kind {_HASH}, found kind {recipe.get('phash', 1)}, of another "
            "release; shard its images anew into another folder"
        )


def check_codecs(recipe: Mapping[str, Any]) -> None:
    """Refuse to work with other codecs, hashes or rules than the recipe's: the bytes would be others.

    Raises:
        DatasetError: names those that differ.
    """
    check_hashes(recipe, of="the version that this adds to")
    if recipe.get("rules") != _RULES:
        raise DatasetError(
            f"the version that this adds to: expected images judged by rules {_RULES}, found rules "
            f"{recipe.get('rules', 1)}, of another release; shard its images anew into another folder"
        )
    there = recipe_of(RecipeConfig())["codecs"]
    wrong = [
        f"{name} {there.get(name)} instead of {version}"
        for name, version in recipe["codecs"].items()
        if there.get(name) != version
    ]
    if wrong:
        raise DatasetError(
            f"the images would not become the same bytes here: {', '.join(wrong)}. Install the same releases as where "
            "the job was started, or the version built"
        )


def look(data: bytes, recipe: RecipeConfig) -> Header | Refusal:
    """What the header tells, and whether it admits the image; no pixel is decoded."""
    try:
        return Header(*_admitted(data, recipe).size)
    except ImageError as error:
        return refusal_of(error, data)
    except Exception as error:  # a decoder may raise anything, and no file is worth a job
        return Refusal("decoder_error", _told(error))


def ingest(data: bytes, name: str, recipe: RecipeConfig) -> Sample | Refusal:
    """What lies in the shard for an image.

    Args:
        data: the file's bytes.
        name: of the file, for its extension.
        recipe: sizes and quality.
    """
    try:
        return _ingest(data, name, recipe)
    except ImageError as error:
        return refusal_of(error, data)
    except Exception as error:
        return Refusal("decoder_error", _told(error))


def refusal_of(error: ImageError, data: bytes = b"") -> Refusal:
    detail = str(error).removeprefix(f"{error.reason}: ")
    thumbnail = None
    if error.reason in _SHOWN_THOUGH_REFUSED:
        try:
            small = decode(data)
            small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
            thumbnail = encode_jpeg(small, quality=80)
        except Exception:
            thumbnail = None  # refused for another reason as well
    return Refusal(error.reason, detail, thumbnail)


def perceptual_hash(picture: Image.Image) -> int:
    """64 bits that hardly change when an image is scaled, encoded anew or brightened.

    The signs, against their median, of the lowest 8 x 8 frequencies of the luma at 32 x 32 pixels. Those are averages
    of some of the pixels, weighted by how far they lie from the average's middle: what counts a pixel to one side of a
    border or the other gives another hash to the same picture of another size.
    """
    step = max(1, min(picture.size) // _HASH_SAMPLES)
    few = picture.resize((picture.width // step, picture.height // step), Image.Resampling.NEAREST)
    little = few.resize((_HASH_SIDE, _HASH_SIDE), Image.Resampling.BILINEAR)
    small = np.asarray(little.convert("L"), np.float64)
    low = (_COSINES @ small @ _COSINES.T).reshape(-1)  # (64,)
    bits = low > np.partition(low[1:], _HASH_MEDIAN)[_HASH_MEDIAN]  # of 63 values; np.median takes as long as all else
    # The mean tells nothing of what is shown; its place tells which way the picture is brighter, left to right.
    bits[0] = small[:, : _HASH_SIDE // 2].sum() > small[:, _HASH_SIDE // 2 :].sum()
    return int.from_bytes(np.packbits(bits).tobytes())


def _cosines() -> NDArray[np.float64]:
    """(8, 32): the first rows of the discrete cosine transform."""
    frequency, place = np.mgrid[:_HASH_FREQUENCIES, :_HASH_SIDE]
    rows: NDArray[np.float64] = np.cos(np.pi * frequency * (place + 0.5) / _HASH_SIDE)
    return rows


_COSINES = _cosines()
_HASH_MEDIAN = (_HASH_FREQUENCIES**2 - 1) // 2


def _admitted(data: bytes, recipe: RecipeConfig) -> Image.Image:
    """The opened, undecoded image, if its header admits it."""
    image = open_header(data, max_pixels=int(recipe.max_megapixels * 1e6))
    short, long = sorted(image.size)
    if long > recipe.max_aspect * short:
        raise ImageError("too_thin", f"{image.width}x{image.height} is longer than {recipe.max_aspect:g}:1")
    if short < recipe.min_side:
        raise ImageError("too_small", f"{image.width}x{image.height} is below {recipe.min_side} px")
    return image


def _ingest(data: bytes, name: str, recipe: RecipeConfig) -> Sample:
    image = _admitted(data, recipe)
    image.info.pop("xmp", None)  # by which Pillow would turn a TIFF, and nobody else
    stored_format, mode = image.format or "", image.mode
    repairs = []
    if PurePath(name).suffix.lower() not in _EXTENSIONS.get(stored_format, (f".{stored_format.lower()}",)):
        repairs.append("wrong_extension")
    orientation, repair = _orientation(image)
    repairs += repair
    if getattr(image, "n_frames", 1) > 1:
        repairs.append("first_frame")
    profile = image.info.get("icc_profile")
    foreign = profile is not None and not is_srgb(profile)
    size = stored_size(*image.size, recipe)
    unchanged = mode == "RGB" and orientation == 1 and not foreign and size == image.size
    pixels = None
    if stored_format == "JPEG" and unchanged:
        # Its bytes stay: all that is asked is whether they are whole, and an eighth of the size tells that too.
        luma, stray = decode_jpeg(data, "GRAY", at_least=(_HASH_DECODED, _HASH_DECODED))
        if luma is not None and not stray:
            return Sample(data, *image.size, tuple(repairs), perceptual_hash(Image.fromarray(luma[..., 0])))
    if stored_format in ("JPEG", "MPO"):
        if mode == "RGB":
            # One that is to become much smaller is decoded at a fraction of its size, at twice the wanted one or more:
            # the kernel is what shapes the result.
            pixels, stray = decode_jpeg(data, "RGB", at_least=(2 * size[0], 2 * size[1]))
        else:  # for Pillow to decode, once it is known to be whole
            _, stray = decode_jpeg(data, "CMYK" if mode == "CMYK" else "GRAY", at_least=(1, 1))
        repairs += ["stray_bytes"] if stray else []
    if pixels is None or orientation != 1 or foreign:
        picture = _loaded(image) if pixels is None else Image.fromarray(pixels)
        picture.info.update(image.info)
        if orientation != 1:
            picture = upright(picture)
            size = stored_size(*picture.size, recipe)  # TIFF's header tells the upright size, those of others not
        picture, repair = _visible_srgb(picture, foreign)
        repairs += repair
        pixels = np.asarray(picture)
    if mode != "RGB":
        repairs.append(f"mode_{mode.lower().replace(';', '_')}")
    if size != (pixels.shape[1], pixels.shape[0]):
        pixels = scale_down(pixels, *size, kernel=recipe.resample)
    picture = Image.fromarray(pixels)
    jpeg = encode_jpeg(picture, quality=recipe.jpeg_quality)
    return Sample(jpeg, *size, tuple(sorted(repairs)), perceptual_hash(picture))


def _orientation(image: Image.Image) -> tuple[int, list[str]]:
    if image.format == "PNG":
        _loaded(image)  # whose EXIF may lie behind the pixels, and damaged pixels are not damaged EXIF
    try:  # a TIFF is turned when it is loaded, by its own tag
        orientation = image.getexif().get(ORIENTATION, 1) if image.format == "TIFF" else orientation_of(image)
    except Exception:  # EXIF is written by anything that ever touched a photograph
        return 1, ["exif_invalid"]
    if orientation == 1:
        return 1, []
    # Cameras write 1 ... 8; anything else says nothing of how the picture lies.
    return (orientation, ["exif_orientation"]) if orientation in range(2, 9) else (1, ["exif_invalid"])


def _loaded(image: Image.Image) -> Image.Image:
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError("truncated", _told(error)) from error
    return image


def _visible_srgb(picture: Image.Image, foreign: bool) -> tuple[Image.Image, list[str]]:
    """A picture of any mode as sRGB on white, and whether its profile, if that is `foreign`, could be used."""
    repairs = []
    if "transparency" in picture.info:
        picture = picture.convert("RGBA")
    if "A" in picture.getbands() and picture.getchannel("A").getextrema() == (0, 0):
        raise ImageError("transparent", "not a single pixel is visible")
    if foreign:
        try:
            picture = to_srgb(picture)
            repairs.append("icc_profile")
        except ValueError:
            repairs.append("icc_unreadable")
    return to_rgb(picture), repairs


def _told(error: Exception) -> str:
    """What a decoder says, without what differs from run to run."""
    return re.sub(r" ?<[^>]*0x[0-9a-f]+>", "", f"{type(error).__name__}: {error}")
