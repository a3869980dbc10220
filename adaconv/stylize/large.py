"""Pictures larger than memory: a file to a raster on disk and back, in strips, through libvips.

PNG, TIFF, WebP and JPEG are read and written row by row where their format allows: interlaced and progressive files
are held as a whole by their decoder.
"""

import struct
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from adaconv.images import RGB_MODES, ImageError, fits, libvips, open_header, require_sound_jpeg
from adaconv.stylize.outputs import PNG_LEVEL, Metadata, Recipe, add_exif, xmp_of
from adaconv.stylize.raster import FileRaster

_STRIP_BYTES = 2**20
_SAMPLES_PER_PIXEL, _EXTRA_SAMPLES = 277, 338  # TIFF's
_TRANSPARENCY = {1, 2}  # of extra samples; others are an editor's selections and the like
_MOST_CHANNELS = 4


def reads(path: Path) -> bool:
    """Whether libvips reads a file as Pillow does: not BMP, not TIFF in CIELAB, in YCbCr, of 32 bits (see
    images.to_rgb) or with channels that are no transparency, and no PNG with its EXIF behind the pixels.
    """
    with open_header(path, max_pixels=None) as image:
        if isinstance(image, TiffImageFile):
            extra, channels = image.tag_v2.get(_EXTRA_SAMPLES, ()), image.tag_v2.get(_SAMPLES_PER_PIXEL, 1)
            if not set(extra) <= _TRANSPARENCY or channels > _MOST_CHANNELS:
                return False
        if image.format == "PNG" and _has_late_exif(path):
            return False
        return image.format != "BMP" and image.mode not in ("LAB", "YCbCr", "F", "I")


def _has_late_exif(path: Path) -> bool:
    """Libvips looks at what stands before a PNG's pixels."""
    behind = False
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            behind = behind or head[4:] == b"IDAT"
            if head[4:] == b"eXIf":
                return behind
            file.seek(int.from_bytes(head[:4], "big") + 4, 1)
    return False


def unpack(path: Path, raw: Path, *, keep_colours: bool = False) -> FileRaster:
    """A picture's file as (3, H, W) uint8 on disk: upright, sRGB, transparency on white.

    Args:
        path: any file that is an image by its header; see images.open_header.
        raw: made anew.
        keep_colours: leave the colours in those of its ICC profile.

    Raises:
        ImageError: `truncated` or `corrupt_data` where the pixels are not all there.
        OSError: the disk has no room; names the file.
    """
    vips = libvips()
    require_sound_jpeg(path)
    with open_header(path, max_pixels=None) as header:
        keep_colours = keep_colours and header.mode in RGB_MODES
        bare_inks = header.mode == "CMYK" and not fits(header.info.get("icc_profile", b""), "CMYK")
    try:
        image = vips.Image.new_from_source(_as_it_is(path), "", access="sequential", fail_on="error")
        if image.get_typeof("orientation") and image.get("orientation") > 1:
            image = vips.Image.new_from_source(_as_it_is(path), "", fail_on="error").autorot()
        if bare_inks:
            image = _light_of_inks(image)
        elif image.get_typeof("icc-profile-data") and not keep_colours:
            image = image.icc_transform(
                "srgb", embedded=True, intent="relative", black_point_compensation=True, depth=8
            )
        elif image.interpretation != "srgb":
            image = image.colourspace("srgb")
        if image.hasalpha():
            image = image.flatten(background=[255, 255, 255])
        image = image.cast("uchar")
        raster = FileRaster(raw, 3, image.height, image.width, torch.uint8)
        try:  # into the room that it has taken; a path would be emptied first
            image.rawsave_target(vips.Target.new_to_descriptor(raster.fileno()))
        except vips.Error:
            raster.close()
            raise
    except vips.Error as error:
        raise _memory_or(error, ImageError("truncated", " ".join(str(error.detail).split()))) from error
    return raster


def pack(raster: FileRaster, path: Path, recipe: Recipe, *, metadata: Metadata | None = None) -> None:
    """A raster (3, H, W) uint8 as a file with its recipe, as outputs.encode writes it for small pictures."""
    vips = libvips()
    kept = metadata or Metadata()
    image = vips.Image.new_from_source(_as_tiff(raster), "", access="sequential").copy(interpretation="srgb")
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
                image.pngsave(str(path), compression=PNG_LEVEL)
            case "jpeg":
                image.jpegsave(str(path), Q=quality, subsample_mode="off")
            case "webp":
                image.webpsave(str(path), Q=quality)
            case _:
                image.tiffsave(str(path), compression="deflate", bigtiff=True)
                with path.open("r+b") as file:
                    add_exif(file, kept.exif)
    except vips.Error as error:
        raise _memory_or(error, OSError(f"{path}: {' '.join(str(error).split())}")) from error


def _memory_or(error: Exception, other: Exception) -> Exception:
    """What an error of libvips is: it tells a lack of memory by words alone."""
    return MemoryError(str(error)) if "out of memory" in str(error) else other


def thumbnail_of(path: Path, *, side: int) -> Image.Image:
    """At most `side` pixels a side, without the whole picture in memory."""
    vips = libvips()
    small = vips.Image.thumbnail(str(path), side, height=side, size="down", export_profile="srgb").colourspace("srgb")
    small = small.flatten(background=[255, 255, 255]) if small.hasalpha() else small
    return Image.fromarray(small.cast("uchar").numpy())


def _light_of_inks(image: Any) -> Any:
    """CMYK of no profile to RGB by Pillow's arithmetic; libvips would take a profile of its own."""
    image = image >> 8 if image.format == "ushort" else image
    light = 255 - image[3]
    return (light - (image[0:3] * light / 255).rint()).copy(interpretation="srgb")


def _as_it_is(path: Path) -> Any:
    """A file for libvips, which would map a file that it opens itself."""
    file = path.open("rb")
    source = libvips().SourceCustom()
    source.on_read(file.read)
    source.on_seek(file.seek)
    return source


def _as_tiff(raster: FileRaster) -> Any:
    """A raster for libvips as a TIFF of strips that are not compressed: it maps raw pixels, and takes no others."""
    head, length = _tiff_head(raster.height, raster.width)
    place = 0

    def read(size: int) -> bytes:
        nonlocal place
        found = head[place : place + size] or raster.read_bytes(place - len(head), size)
        place += len(found)
        return found

    def seek(offset: int, whence: int) -> int:
        nonlocal place
        place = offset + (0, place, length)[whence]
        return place

    source = libvips().SourceCustom()
    source.on_read(read)
    source.on_seek(seek)
    return source


def _tiff_head(height: int, width: int) -> tuple[bytes, int]:
    """What stands before the pixels (H, W, 3) uint8 in a BigTIFF file, and the file's length."""
    short, long = 3, 16
    rows = max(1, min(height, _STRIP_BYTES // (3 * width)))
    strips = -(-height // rows)
    entries = 10
    tables = 16 + 8 + 20 * entries + 8  # where the strips' places and sizes begin, if they are more than one
    first = tables + 16 * strips
    sizes = [3 * width * min(rows, height - rows * index) for index in range(strips)]
    places = [first + 3 * width * rows * index for index in range(strips)]
    colours = struct.unpack("<Q", struct.pack("<4H", 8, 8, 8, 0))[0]
    fields = (
        (256, long, 1, width),
        (257, long, 1, height),
        (258, short, 3, colours),  # bits of each colour
        (259, short, 1, 1),  # not compressed
        (262, short, 1, 2),  # RGB
        (273, long, strips, places[0] if strips == 1 else tables),
        (277, short, 1, 3),
        (278, long, 1, rows),
        (279, long, strips, sizes[0] if strips == 1 else tables + 8 * strips),
        (284, short, 1, 1),  # colours side by side
    )
    directory = struct.pack("<Q", len(fields)) + b"".join(struct.pack("<HHQQ", *field) for field in fields)
    head = struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16) + directory + struct.pack("<Q", 0)
    head += struct.pack(f"<{2 * strips}Q", *places, *sizes)
    return head, first + 3 * width * height
