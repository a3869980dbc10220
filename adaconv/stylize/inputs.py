"""Where contents and styles come from, and how one becomes a picture.

A source is an image, a folder or zip of images, a dataset version (ROOT or ROOT@VERSION), or a Parquet file with a
column of images (FILE.parquet or FILE.parquet#COLUMN). Styles may be style packs too (FILE.safetensors, or a folder of
them), or mixtures: a FILE.csv with a row for each part of each, its columns `name` of the mixture, `style` (an image or
style pack, seen from the table's folder) and `weight` (1). All may lie here or on s3://.
"""

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from adaconv import storage
from adaconv.data.manifest import open_version
from adaconv.data.sources import Found, Member, iter_images, read_found
from adaconv.errors import UsageError
from adaconv.images import EXTENSIONS, RGB_MODES, ImageError, as_seen, open_header, require_sound_jpeg
from adaconv.stylize.outputs import MOST_PARTS, Metadata
from adaconv.stylize.tables import read_table

if TYPE_CHECKING:
    from adaconv.stylize.style_pack import StylePack

log = logging.getLogger(__name__)

_NAMES = ("path", "name", "file_name", "filename", "key", "id")  # columns that may tell what an image is called


@dataclass(frozen=True)
class Item:
    """One content or style. `source`: what it is called, unique within its list; `uri`: of the file that holds it.

    `place`: where in it: offset and size in a shard; row group and row of a Parquet file; the size alone otherwise.
    `parts`: of a mixture, as JSON: rows of items, each with its weight.
    """

    kind: Literal["file", "sample", "cell", "pack", "mixture"]
    source: str
    uri: str
    place: tuple[int, int] = (0, 0)
    column: str = ""
    member: Member | None = None
    parts: str = ""

    def to_row(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Item":
        member = Member(*row["member"]) if row["member"] else None
        return cls(**{**row, "place": tuple(row["place"]), "member": member})


def list_items(sources: Iterable[str], *, flag: str, packs: bool = False) -> list[Item]:
    """Everything that a flag's sources hold, each source sorted by name.

    Args:
        sources: see above.
        flag: for messages, as in `--content`.
        packs: whether style packs and mixtures are taken.

    Raises:
        UsageError: a source is not there, is none of these, or holds nothing.
    """
    items: list[Item] = []
    for source in sources:
        found = sorted(_items_of(source, flag, packs), key=lambda item: item.source)
        if not found:
            raise UsageError(f"{flag} {source}: expected images, found none")
        items += found
    return items


def reading_order(row: dict[str, Any]) -> tuple[str, tuple[int, ...]]:
    """A key to sort items' rows by: cells of one row group follow one another, whatever they are called."""
    return (row["uri"], tuple(row["place"])) if row["kind"] == "cell" else ("", ())


def spread(found: list[Item], limit: int | None) -> list[Item]:
    """At most `limit` of them, evenly over the sorted list: folders of styles are all touched before one is emptied."""
    if limit is None or limit >= len(found):
        return found
    return [found[position * len(found) // limit] for position in range(limit)]


def check_apart(sources: Iterable[str], output: str, *, flag: str) -> None:
    """Refuse outputs in a folder of sources: the same command again would take them for contents or styles.

    Raises:
        UsageError: names both.
    """
    images = storage.join(_real(output), "images")
    for source in sources:
        root = _real(source)
        inside = images.removeprefix(root.rstrip("/") + "/")
        seen = inside != images and not any(part.startswith(".") for part in inside.split("/"))
        if (seen and not _is_version(source)) or f"{root}/".startswith(f"{images}/"):
            raise UsageError(
                f"{flag} {source}: expected a folder apart from the outputs, found --output {output}; the same command "
                "again would stylize what it made: choose another --output"
            )


def mixture_of(item: Item, pack_of: Callable[[Item], "StylePack"]) -> "StylePack":
    """The pack of a mixture, given how to get that of each part.

    Raises:
        ImageError: a part cannot be used; says which.
    """
    from adaconv.stylize.style_pack import mix_packs  # which brings torch

    packs, weights = [], []
    for row, weight in json.loads(item.parts):
        if not weight:
            continue
        part = Item.from_row(row)
        try:
            packs.append(pack_of(part))
        except ImageError as error:
            raise ImageError(error.reason, f"{part.source}, a part: {error}") from error
        weights.append(weight)
    return replace(mix_packs(packs, weights), source=item.source)


def read_item(item: Item) -> bytes:
    """The bytes of an image or pack.

    Raises:
        ImageError: this one alone cannot be had.
        OSError: the storage fails.
    """
    if item.kind == "sample":
        return storage.read_range(item.uri, *item.place)
    if item.kind == "cell":
        return _cell(item)
    return read_found(Found(item.uri, item.source, item.place[0], "", item.member))


def local_file(item: Item, folder: Path) -> Path:
    """The image as a local file: itself, or a copy in a folder.

    Raises:
        ImageError, OSError: as read_item.
    """
    if item.kind == "file" and item.member is None and storage.is_local(item.uri):
        path = Path(item.uri)
        if not path.exists():
            raise ImageError("vanished", "it was listed, and is not there any more, or is a link to nowhere")
        return path
    path = folder / "item"
    path.write_bytes(read_item(item))
    return path


def sha256_of(path: Path) -> str:
    """Of a file that local_file gave.

    Raises:
        ImageError: `unreadable`: no permission.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except PermissionError:
        raise ImageError("unreadable", "no permission to read it") from None


def decode_picture(path: Path, *, max_pixels: int | None, keep_colours: bool = False) -> Image.Image:
    """An upright RGB picture in sRGB, transparency on white.

    Args:
        path: of an image's file.
        max_pixels: more are refused by the header; None admits any size.
        keep_colours: leave the colours in those of its RGB profile.

    Raises:
        ImageError: by the header, see images.open_header; `truncated` or `corrupt_data` where pixels are missing;
            `decoder_error` for whatever else its decoder says.
    """
    with open_header(path, max_pixels=max_pixels) as image:
        require_sound_jpeg(path)
        try:
            picture = as_seen(image, keep_colours=keep_colours)
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise ImageError("truncated", str(error)) from error
        except MemoryError:
            raise
        except Exception as error:  # a decoder may raise anything, and no file is worth a job
            raise ImageError("decoder_error", f"{type(error).__name__}: {error}") from error
    picture.info.clear()  # all that it said has been done
    return picture


def metadata_of(path: Path) -> Metadata:
    with open_header(path, max_pixels=None) as image:
        kept = Metadata.of(image)
        return kept if image.mode in RGB_MODES else Metadata(kept.exif)  # a profile of CMYK fits no RGB


def _items_of(source: str, flag: str, packs: bool) -> Iterator[Item]:
    plain, column = (source, "") if source.lower().endswith(".parquet") else source.rpartition("#")[::2]
    if plain.lower().endswith(".parquet"):
        yield from _cells(storage.absolute(plain), source, column, flag)
    elif packs and source.lower().endswith(".safetensors"):
        uri = storage.absolute(source)
        if not storage.exists(uri):
            raise UsageError(f"{flag} {source}: expected a style pack, found nothing there")
        yield Item("pack", storage.name_of(uri), uri)
    elif packs and source.lower().endswith(".csv") and not storage.is_directory(storage.absolute(source)):
        yield from _mixtures(storage.absolute(source), flag)
    elif _is_version(source):
        yield from _samples(source)
    elif _is_image(source):
        uri = storage.absolute(source)
        yield Item("file", storage.name_of(uri), uri, (storage.size_of(uri), 0))
    else:
        root = storage.absolute(source)
        entries = list(storage.walk(root)) if packs else []
        found = [entry for entry in entries if entry.path.endswith(".safetensors")]
        yield from (Item("pack", entry.path, entry.uri) for entry in found)
        images = sum(PurePath(entry.path).suffix.lower() in EXTENSIONS for entry in entries)
        if found and images:
            log.warning(
                "%s %s: %d style packs are taken, %d images beside them are not", flag, source, len(found), images
            )
        if not found:
            yield from (
                Item("file", f.source, f.uri, (f.bytes, 0), member=f.member) for f in iter_images((source,), flag=flag)
            )


def _real(uri: str) -> str:
    """One name for a place, however it was given."""
    return os.path.realpath(Path(uri).expanduser()) if storage.is_local(uri) else storage.absolute(uri)


def _is_version(source: str) -> bool:
    is_spec = "@" in storage.name_of(source) and PurePath(source).suffix.lower() not in EXTENSIONS  # photo@2x.png
    if is_spec and not storage.exists(storage.absolute(source)):
        return True
    root = storage.absolute(source)
    return storage.exists(storage.join(root, "LATEST")) and storage.is_directory(storage.join(root, "versions"))


def _is_image(source: str) -> bool:
    uri = storage.absolute(source)
    return PurePath(source).suffix.lower() in EXTENSIONS and storage.exists(uri) and not storage.is_directory(uri)


def _mixtures(uri: str, flag: str) -> Iterator[Item]:
    folder = uri.removesuffix(storage.name_of(uri))
    parts: dict[str, list[tuple[dict[str, Any], float]]] = {}
    known: dict[str, dict[str, Any]] = {}  # a store is asked once for each style, in however many mixtures it is
    for where, row in read_table(uri, flag=flag):
        cells = {str(column).strip(): str(cell or "").strip() for column, cell in row.items()}
        if set(cells) - {"weight"} != {"name", "style"}:
            raise UsageError(f"{where}: expected columns name, style and weight, found {', '.join(cells)}")
        name, style, weight = cells["name"], cells["style"], cells.get("weight", "")
        if not name or not style:
            raise UsageError(f"{where}: expected the name of a mixture and a style, found {name!r} and {style!r}")
        try:
            share = float(weight or 1)
        except ValueError:
            share = -1.0
        if not 0 <= share < math.inf:
            raise UsageError(f"{where}: expected a weight of 0 or more, found {weight!r}")
        seen_from = "" if "://" in style or os.path.isabs(os.path.expanduser(style)) else folder
        if style not in known:
            known[style] = _part(storage.absolute(seen_from + style), where).to_row()
        parts.setdefault(name, []).append((known[style], share))
    for name, of_name in parts.items():
        if not sum(weight for _, weight in of_name):
            raise UsageError(f"{flag} {uri}: expected a weight above 0 in {name}, found none")
        if len(different := {part["uri"] for part, weight in of_name if weight}) > MOST_PARTS:
            raise UsageError(
                f"{flag} {uri}: expected a mixture of at most {MOST_PARTS} styles, found {len(different)} in {name}"
            )
        yield Item("mixture", name, uri, parts=json.dumps(of_name))


def _part(uri: str, where: str) -> Item:
    kind: Literal["file", "pack"] = "pack" if uri.lower().endswith(".safetensors") else "file"
    try:
        if kind == "file" and not _is_image(uri):
            raise FileNotFoundError
        return Item(kind, storage.name_of(uri), uri, (storage.size_of(uri), 0))
    except UsageError as error:  # a scheme that nothing reads
        raise UsageError(f"{where}: {error}") from None
    except FileNotFoundError:
        raise UsageError(f"{where}: expected an image or style pack, found none at {uri}") from None


def _samples(source: str) -> Iterator[Item]:
    version = open_version(source)
    for row in version.samples(["source", "shard", "offset", "size"]).to_pylist():
        yield Item("sample", row["source"], version.shard_uri(row["shard"]), (row["offset"], row["size"]))


def _cells(uri: str, source: str, column: str, flag: str) -> Iterator[Item]:
    if not storage.exists(uri):
        raise UsageError(f"{flag} {source}: expected a Parquet file, found nothing there")
    with storage.open_binary(uri) as file:
        try:
            table = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise UsageError(f"{flag} {source}: expected a Parquet file, found: {error}") from None
        images = {f.name for f in table.schema_arrow if _holds_images(f.type)}
        column = column or next((f.name for f in table.schema_arrow if f.name in images), "")
        if column not in images:
            raise UsageError(
                f"{flag} {source}: expected a column of images (binary, or a struct with `bytes`), found "
                f"{', '.join(f'{f.name}: {f.type}' for f in table.schema_arrow)}"
            )
        named = next((n for n in _NAMES if n in table.schema_arrow.names and n != column), None)
        inside = pa.types.is_struct(table.schema_arrow.field(column).type)
        found: list[tuple[int, int, str]] = []
        for group in range(table.num_row_groups):
            names: list[Any] = [None] * table.metadata.row_group(group).num_rows
            try:
                if named is not None:
                    names = table.read_row_group(group, [named]).column(0).to_pylist()
                elif inside and "path" in [f.name for f in table.schema_arrow.field(column).type]:
                    paths = table.read_row_group(group, [f"{column}.path"]).column(0).to_pylist()
                    names = [cell and cell["path"] for cell in paths]
            except (pa.ArrowException, OSError) as error:
                if not _is_damage(error):
                    raise
                log.warning("%s %s: the names in row group %d cannot be read: %s", flag, source, group, error)
            found += ((group, row, "" if name is None else str(name)) for row, name in enumerate(names))  # 0 is a name
        told = _told([name for _, _, name in found])
        for number, ((group, row, _), name) in enumerate(zip(found, told, strict=True)):
            yield Item("cell", name or f"row-{number:08d}", uri, (group, row), column)


def _told(names: Sequence[str]) -> list[str]:
    """Names with as few folders of absolute paths, one at least, as tell these apart: a machine's stay with it."""
    absolute = {name: behind for name in names if (behind := _parts_of_absolute(name))}
    parts, most = 2, max(map(len, absolute.values()), default=0)
    while parts < most and len({path[-parts:] for path in absolute.values()}) < len(absolute):
        parts += 1
    return ["/".join(absolute[name][-parts:]) if name in absolute else name for name in names]


def _parts_of_absolute(name: str) -> tuple[str, ...]:
    """Behind the root, of a path of this system, of Windows, or of a file:// URI; of any other name none."""
    path = name.removeprefix("file://")
    if re.match(r"[A-Za-z]:[\\/]|\\\\", path):
        return PureWindowsPath(path).parts[1:]
    return PurePosixPath(path).parts[1:] if path.startswith("/") else ()


def _holds_images(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return any(f.name == "bytes" and pa.types.is_binary(f.type) for f in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_damage(error: Exception) -> bool:
    """Whether a row group is to blame, not memory or the storage, whose errors say more than Arrow's own."""
    return not isinstance(error, (OSError, MemoryError)) or (type(error) is OSError and error.errno is None)


def _cell(item: Item) -> bytes:
    group, row = item.place
    try:
        value = _row_group(item.uri, group, item.column)[row].as_py()
    except (pa.ArrowException, OSError) as error:
        if not _is_damage(error):
            raise
        raise ImageError("corrupt_data", f"its row group cannot be read: {str(error).strip()}") from error
    data = value["bytes"] if isinstance(value, dict) else value
    if data is None:
        raise ImageError("empty", "the cell has no bytes")
    return bytes(data)


@lru_cache(maxsize=1)  # neighbours are read one after the other, see reading_order
def _row_group(uri: str, group: int, column: str) -> Any:
    with storage.open_binary(uri) as file:
        return pq.ParquetFile(file).read_row_group(group, [column]).column(0)
