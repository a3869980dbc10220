"""Pictures larger than memory: a file to a raster on disk and back, in strips, through libvips.

PNG, TIFF, WebP and JPEG are read and written row by row where their format allows: interlaced and progressive files
are held as a whole by their decoder.
"""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from adaconv.images import ImageError
from adaconv.stylize.outputs import Metadata, Recipe, xmp_of
from adaconv.stylize.raster import FileRaster


def reads(path: Path) -> bool:
    """Whether libvips knows a file's format: it does but for BMP."""
    with path.open("rb") as file:
        return file.read(2) != b"BM"


def unpack(path: Path, raw: Path, *, keep_colours: bool = False) -> FileRaster:
    """A picture's file as (3, H, W) uint8 on disk: upright, sRGB, transparency on white.

    Args:
        path: any file that is an image by its header; see images.open_header.
        raw: made anew.
        keep_colours: leave the colours in those of its ICC profile.

    Raises:
        ImageError: `truncated` where the pixels are not all there.
    """
    vips = _vips()
    try:
        image = vips.Image.new_from_file(str(path), access="sequential", fail_on="error")
        if image.get_typeof("orientation") and image.get("orientation") > 1:
            image = vips.Image.new_from_file(str(path), fail_on="error").autorot()
        if image.get_typeof("icc-profile-data") and (not keep_colours or image.bands not in (3, 4)):
            image = image.icc_transform("srgb", embedded=True, intent="relative", black_point_compensation=True)
        elif image.interpretation != "srgb":
            image = image.colourspace("srgb")
        if image.hasalpha():
            image = image.flatten(background=[255, 255, 255])
        image.cast("uchar").rawsave(str(raw))
    except vips.Error as error:
        if "out of memory" in str(error):
            raise MemoryError(str(error)) from error
        raise ImageError("truncated", " ".join(str(error.detail).split())) from error
    return FileRaster(raw, 3, image.height, image.width, torch.uint8, fresh=False)


def pack(raster: FileRaster, path: Path, recipe: Recipe, *, metadata: Metadata | None = None) -> None:
    """A raster (3, H, W) uint8 as a file with its recipe, as outputs.encode writes it for small pictures."""
    vips = _vips()
    kept = metadata or Metadata()
    image = vips.Image.rawload(str(raster.path), raster.width, raster.height, 3).copy(interpretation="srgb")
    kind = recipe.options.get("format", "png")
    blob, text = vips.GValue.blob_type, vips.GValue.gstr_type
    notes: list[tuple[Any, str, Any]] = [
        (text, "png-comment-0-adaconv", recipe.to_json()) if kind == "png" else (blob, "xmp-data", xmp_of(recipe))
    ]
    notes += [(blob, "icc-profile-data", kept.icc_profile)] if kept.icc_profile else []
    notes += [(blob, "exif-data", kept.exif)] if kept.exif else []
    for kind_of_value, name, value in notes:
        image.set_type(kind_of_value, name, value)
    quality = int(recipe.options.get("quality", 90))
    try:
        match kind:
            case "png":
                image.pngsave(str(path), compression=4)
            case "jpeg":
                image.jpegsave(str(path), Q=quality, subsample_mode="off")
            case "webp":
                image.webpsave(str(path), Q=quality)
            case _:
                image.tiffsave(str(path), compression="deflate", bigtiff=True)
    except vips.Error as error:
        if "out of memory" in str(error):
            raise MemoryError(str(error)) from error
        raise OSError(f"{path}: {' '.join(str(error).split())}") from error


def thumbnail_of(path: Path, *, side: int) -> Image.Image:
    """At most `side` pixels a side, without the whole picture in memory."""
    vips = _vips()
    small = vips.Image.thumbnail(str(path), side, height=side, size="down").colourspace("srgb")
    small = small.flatten(background=[255, 255, 255]) if small.hasalpha() else small
    return Image.fromarray(small.cast("uchar").numpy())


def _vips() -> Any:
    import pyvips  # a library of 40 MB that most pictures do not need

    pyvips.cache_set_max(0)
    return pyvips
