"""One image: (bytes, recipe) -> sample or refusal. A pure function, whatever machine it runs on."""

import hashlib
from dataclasses import dataclass
from pathlib import PurePath

from PIL import Image, ImageOps

from adaconv.config.shard import RecipeConfig
from adaconv.images import ImageError, encode_jpeg, open_header, to_rgb

_EXTENSION_FORMATS = {"JPEG": (".jpg", ".jpeg"), "TIFF": (".tif", ".tiff")}
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Sample:
    """`jpeg` is what lies in the shard; `repairs` names what was changed besides the size."""

    jpeg: bytes
    width: int
    height: int
    repairs: tuple[str, ...]


def key_of(data: bytes) -> str:
    """Name of a sample: 32 hex digits of the sha256 of its source's bytes. No dots: WebDataset splits names there."""
    return hashlib.sha256(data).hexdigest()[:32]


def stored_size(width: int, height: int, recipe: RecipeConfig) -> tuple[int, int]:
    """Width and height after scaling down to the recipe's shorter side; nothing is enlarged."""
    short = min(width, height)
    if short <= recipe.short_side:
        return width, height
    return round(width * recipe.short_side / short), round(height * recipe.short_side / short)


def refuse_by_header(data: bytes, recipe: RecipeConfig) -> Image.Image:
    """The opened, undecoded image, if its header admits it.

    Raises:
        ImageError: `empty`, `not_an_image`, `too_many_pixels`, `too_small`, `too_thin`.
    """
    image = open_header(data, max_pixels=int(recipe.max_megapixels * 1e6))
    short, long = sorted(image.size)
    if long > recipe.max_aspect * short:
        raise ImageError("too_thin", f"{image.width}x{image.height} is longer than {recipe.max_aspect:g}:1")
    if short < recipe.min_side:
        raise ImageError("too_small", f"{image.width}x{image.height} is below {recipe.min_side} px")
    return image


def ingest(data: bytes, name: str, recipe: RecipeConfig) -> Sample:
    """What lies in the shard for an image.

    Args:
        data: the file's bytes.
        name: of the file, for its extension.
        recipe: sizes and quality.

    Raises:
        ImageError: as refuse_by_header, or `truncated` where the pixels are not all there.
    """
    image = refuse_by_header(data, recipe)
    stored_format, mode = image.format or "", image.mode
    repairs = []
    extensions = _EXTENSION_FORMATS.get(stored_format, (f".{stored_format.lower()}",))
    if PurePath(name).suffix.lower() not in extensions:
        repairs.append("wrong_extension")
    try:
        image.load()
        if image.getexif().get(_ORIENTATION, 1) != 1:
            repairs.append("exif_orientation")
        if getattr(image, "n_frames", 1) > 1:
            repairs.append("first_frame")
        if mode != "RGB":
            repairs.append(f"mode_{mode.lower().replace(';', '_')}")
        upright = to_rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError("truncated", str(error)) from error
    size = stored_size(*upright.size, recipe)
    if size == upright.size and stored_format == "JPEG" and not set(repairs) - {"wrong_extension"}:
        return Sample(data, *size, tuple(repairs))
    if size != upright.size:
        upright = upright.resize(size, Image.Resampling.LANCZOS)
    return Sample(encode_jpeg(upright, quality=recipe.jpeg_quality), *size, tuple(repairs))
