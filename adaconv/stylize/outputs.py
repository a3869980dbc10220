"""The contract between stylization and its users: names, recipes and books of outputs.

    OUTPUT/
      images/<style>/<content>-<16 hex>.png   or .jpg, .webp, .tif; the hash is of content bytes, style pack, model and
                                              options
      styles/<style>-<16 hex>.safetensors     style packs
      index.parquet                           a row for every pair: done, skipped or failed, and why
      gallery.html                            the outputs as a grid, in one file
      result.json                             written last

An output is published whole as soon as it is made and its name says all that determines it: what exists is right.
"""

import hashlib
import html
import io
import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from adaconv import storage
from adaconv.errors import UsageError
from adaconv.images import EXTENSIONS, ORIENTATION, ImageError, open_header
from adaconv.progress import Progress

Format = Literal["png", "jpeg", "webp", "tiff"]

FORMAT = 2
RECIPE_KEY = "adaconv"  # of the PNG text that holds an output's recipe; elsewhere it is in the XMP packet
_NAMESPACE = "https://adaconv.invalid/recipe/2/"
_EXTENSIONS: Mapping[Format, str] = {"png": "png", "jpeg": "jpg", "webp": "webp", "tiff": "tif"}
PNG_LEVEL = 2  # of zlib: 18 ms of a core for 512x512 pixels of paintings, 4 takes 32 for files that are 4 % smaller
_ROWS_AT_ONCE = 16_384  # of the index
MOST_PARTS = 256  # of a mixture: their hashes are in every output, and JPEG has room for 900
_ENDS = {"png": b"\x00\x00\x00\x00IEND\xaeB`\x82", "jpg": b"\xff\xd9"}
LONGEST_SIDE = {"jpeg": 65_500, "webp": 16_383}  # pixels that a format has room for
_XMP_TAG = 700  # of TIFF
_EXIF_TAG, _SIZE_TAGS = 0x8769, (0xA002, 0xA003)  # the directory that cameras write, and width and height in it
# Of TIFF: how and where its pixels lie, and packets that are no EXIF: XMP, IPTC, Photoshop, ICC.
_LAYOUT_TAGS = frozenset(
    (*range(254, 267), 273, *range(277, 282), 284, *range(288, 294), 301, 317, *range(320, 348), *range(512, 533))
) | {_XMP_TAG, 33723, 34377, 34675}
INDEX = pa.schema(
    [
        ("output", pa.string()),
        ("state", pa.string()),
        ("reason", pa.string()),
        ("content", pa.string()),
        ("content_sha256", pa.string()),
        ("style", pa.string()),
        ("style_sha256", pa.string()),
        ("model_digest", pa.string()),
        ("options", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("tile", pa.int32()),
        ("seconds", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Recipe:
    """All that determines an output. No paths of machines and no secrets: it travels with the picture.

    `made`: how it was computed, which changes a picture by rounding only: tile, device, threads, releases.
    """

    content: str
    content_sha256: str
    style: str
    style_sha256: str
    pack_digest: str
    model: str
    model_digest: str
    options: Mapping[str, Any]
    made: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Path below the job's output: what determines the picture, behind a prefix for people."""
        made_of = [FORMAT, self.content_sha256, self.pack_digest, self.model_digest, dict(self.options)]
        digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
        extension = _EXTENSIONS[self.options.get("format", "png")]
        return f"images/{slug(self.style)}/{slug(self.content)}-{digest}.{extension}"

    def to_json(self) -> str:
        return json.dumps({"recipe_format": FORMAT, **self.__dict__}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, *, name: str) -> "Recipe":
        """Read a recipe.

        Raises:
            UsageError: it is none, or one of another format; `name` is what it was found in.
        """
        try:
            described = json.loads(text)
            found = described.pop("recipe_format")
            if found != FORMAT:
                raise UsageError(f"{name}: expected a recipe of format {FORMAT}, found {found}")
            return cls(**described)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(f"{name}: expected a recipe of this project, found damage: {error}") from None


@dataclass(frozen=True)
class Metadata:
    """What an output keeps of its content, on request: EXIF, but for what says how pixels lie, and the ICC profile."""

    exif: bytes = b""
    icc_profile: bytes = b""

    @classmethod
    def of(cls, image: Image.Image) -> "Metadata":
        """Of an opened image; EXIF that cannot be read is left behind."""
        try:
            exif = image.getexif()
            for tag in (ORIENTATION, *_LAYOUT_TAGS):  # the orientation has been applied
                exif.pop(tag, None)
            for tag in _SIZE_TAGS if _EXIF_TAG in exif else ():  # of what was stored, not turned nor scaled
                exif.get_ifd(_EXIF_TAG).pop(tag, None)
            kept = exif.tobytes() if len(exif) else b""
        except Exception:  # EXIF is written by anything that ever touched a photograph
            kept = b""
        return cls(kept, image.info.get("icc_profile") or b"")


def slug(source: str) -> str:
    """A readable, safe file name of at most 50 characters from a file's path or a mixture's name: without odd
    characters and the extension of an image or pack.
    """
    path = PurePosixPath(source)
    name = path.stem if path.suffix.lower() in (*EXTENSIONS, ".safetensors") else path.name
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-.")
    return plain[:50] or "image"


def pack_name(style: str, digest: str) -> str:
    return f"styles/{slug(style)}-{digest[:16]}.safetensors"


def encode(image: Image.Image, recipe: Recipe, *, metadata: Metadata | None = None) -> bytes:
    """A file with its recipe: the same picture and recipe give the same bytes.

    `recipe.options` say the `format` (png) and, for JPEG and WebP, the `quality` (90). EXIF that the format has no room
    for is left behind.
    """
    kept = metadata or Metadata()
    try:
        return _encode(image, recipe, kept)
    except Exception as error:
        if isinstance(error, MemoryError) or not kept.exif:
            raise
        return _encode(image, recipe, replace(kept, exif=b""))


def _encode(image: Image.Image, recipe: Recipe, kept: Metadata) -> bytes:
    told: dict[str, Any] = {name: value for name, value in kept.__dict__.items() if value}
    quality = int(recipe.options.get("quality", 90))
    buffer = io.BytesIO()
    match recipe.options.get("format", "png"):
        case "png":
            notes = PngImagePlugin.PngInfo()
            notes.add_itxt(RECIPE_KEY, recipe.to_json())
            image.save(buffer, "PNG", pnginfo=notes, compress_level=PNG_LEVEL, **told)
        case "jpeg":
            image.save(buffer, "JPEG", quality=quality, subsampling=0, xmp=xmp_of(recipe), **told)
        case "webp":
            image.save(buffer, "WEBP", quality=quality, method=4, xmp=xmp_of(recipe), **told)
        case "tiff":
            told.pop("exif", None)
            image.save(buffer, "TIFF", compression="tiff_adobe_deflate", tiffinfo={_XMP_TAG: xmp_of(recipe)}, **told)
            add_exif(buffer, kept.exif)
        case other:
            raise UsageError(f"options.format: expected {', '.join(_EXTENSIONS)}, found {other}")
    return buffer.getvalue()


def add_exif(file: BinaryIO, exif: bytes) -> None:
    """Put EXIF into a TIFF: libtiff writes no directory within another, where cameras put most of it.

    The file's own directory is written anew behind its end, with what EXIF has besides.
    """
    if not exif:
        return
    file.seek(0)
    head = file.read(16)
    tags = Image.Exif()
    tags.load(exif)
    tags.endian, tags.bigtiff = ("<" if head[:2] == b"II" else ">"), b"+" in head[2:4]
    number, entry, pointer, at = ("Q", 20, "Q", 8) if tags.bigtiff else ("H", 12, "L", 4)
    number, pointer = tags.endian + number, tags.endian + pointer

    def entries(directory: BinaryIO) -> dict[int, bytes]:
        (count,) = struct.unpack(number, directory.read(struct.calcsize(number)))
        each = [directory.read(entry) for _ in range(count)]
        return {struct.unpack_from(f"{tags.endian}H", one)[0]: one for one in each}

    end = file.seek(0, io.SEEK_END)
    end += end % 2  # directories begin at even places
    added = tags.tobytes(end).removeprefix(b"Exif\0\0")[at + struct.calcsize(pointer) :]
    file.seek(struct.unpack_from(pointer, head, at)[0])
    own = entries(file)
    merged = sorted((own | entries(io.BytesIO(added))).items())
    place = end + len(added)
    file.seek(end)
    file.write(added + struct.pack(number, len(merged)) + b"".join(one for _, one in merged) + struct.pack(pointer, 0))
    file.seek(at)
    file.write(struct.pack(pointer, place))


def xmp_of(recipe: Recipe) -> bytes:
    """An XMP packet that holds a recipe."""
    value = html.escape(recipe.to_json(), quote=True)
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" xmlns:adaconv="{_NAMESPACE}" adaconv:recipe="{value}"/>'
        '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def read_recipe(data: bytes, *, name: str = "the file") -> Recipe | None:
    """The recipe of an output; None where the picture carries none.

    Raises:
        UsageError: it is no picture, or what it carries cannot be read.
    """
    try:
        with open_header(data, max_pixels=None) as image:
            text = image.info.get(RECIPE_KEY)
            xmp = image.info.get("xmp") or getattr(image, "tag_v2", {}).get(_XMP_TAG) or b""
    except (ImageError, OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"{name}: expected a picture, found damage: {error}") from None
    if text is None and (found := re.search(rb'adaconv:recipe="([^"]*)"', xmp)):
        text = html.unescape(found[1].decode(errors="replace"))
    return Recipe.from_json(text, name=name) if text else None


def is_whole(uri: str) -> bool:
    """An output is there to its last byte; an object of a store is there altogether or not at all."""
    try:
        size, extension = storage.size_of(uri), uri.rpartition(".")[2]
    except (FileNotFoundError, NotADirectoryError):
        return False
    if not storage.is_local(uri):
        return size > 0
    if extension == "webp":
        head = storage.read_range(uri, 0, 8)
        return head[:4] == b"RIFF" and size == int.from_bytes(head[4:], "little") + 8
    end = _ENDS.get(extension, b"")  # a TIFF has no end of its own: that it was published must do
    return size > len(end) and (not end or storage.read_range(uri, size - len(end), len(end)) == end)


@dataclass(frozen=True)
class Published:
    """Names of the outputs that one listing found. An object of a store that is listed is whole, see is_whole.

    `hashes`: (n,) uint64 of the names, sorted: 8 MB for a million, which the actors of a node share, where a set would
    take 150 MB of each. Names have no more bits of their own.
    """

    hashes: NDArray[np.uint64]

    @classmethod
    def of(cls, root: str) -> "Published":
        """List a job's output folder; none on a disk, where an output's end must be looked at."""
        return cls(np.zeros(0, np.uint64)) if storage.is_local(root) else cls.listed(root)

    @classmethod
    def listed(cls, root: str) -> "Published":
        """All that is there, on a disk as well, whole or not."""

        def below(folder: str) -> NDArray[np.uint64]:
            names = (f"images/{storage.name_of(folder)}/{one.path}" for one in storage.walk(folder) if one.bytes)
            return np.fromiter(map(hash_of, names), np.uint64)

        # A folder for each style, several at once: a store answers a thousand names at a time.
        folders = storage.list_directories(storage.join(root, "images"))
        hashes, progress = [np.zeros(0, np.uint64)], Progress("look for outputs", unit="outputs")
        for some in storage.few_at_once(below, folders, where=root):
            hashes.append(some)
            progress.advance(len(some))
        return cls(np.sort(np.concatenate(hashes)))

    def others(self, hashes: Iterable[int]) -> int:
        """How many there are besides those of these names, see `hash_of`."""
        return int(np.setdiff1d(self.hashes, np.fromiter(hashes, np.uint64)).size)

    def __contains__(self, name: object) -> bool:
        wanted = np.uint64(hash_of(str(name)))
        place = np.searchsorted(self.hashes, wanted)
        return bool(place < len(self.hashes) and self.hashes[place] == wanted)


def hash_of(name: str) -> int:
    """Of an output's name, 64 bits."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


def publish_index(root: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """Write the books: a row for every pair."""
    uri = storage.join(root, "index.parquet")
    with storage.file_for(root) as path:
        with pq.ParquetWriter(path, INDEX, compression="zstd") as writer:
            # By its schema: what else a row has, such as a thumbnail, is left out.
            left = iter(rows)
            while some := list(islice(left, _ROWS_AT_ONCE)):
                writer.write_table(pa.Table.from_pylist(some, schema=INDEX))
        storage.publish_written(path, uri)
    return uri
