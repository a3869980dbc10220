"""The contract between sharding and everything that reads: a dataset version and its manifest.

ROOT/shards/<16 hex of its sha256>.tar    plain WebDataset: KEY.jpg and KEY.json
ROOT/manifests/<version>.parquet          a row for every image found: shard by shard in the order of each tar, then
                                          those in no shard
ROOT/versions/<version>.json              recipe, parent, shards, books, root hash; written last: it publishes
ROOT/LATEST                               the newest version's name

A sample takes `span` bytes of its tar: the header of KEY.jpg, its bytes, KEY.json. `offset` and `size` are those of
the image's bytes, so the span begins HEADER_BYTES before `offset`.
"""

import base64
import contextlib
import hashlib
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, islice
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from adaconv import storage
from adaconv.errors import DatasetError, UsageError
from adaconv.scratch import scratch_folder

log = logging.getLogger(__name__)

SCHEMA_NUMBER = 2
HEADER_BYTES = 512  # of a member of a tar
State = Literal["kept", "repaired", "quarantined", "duplicate", "excluded"]
STATES: tuple[State, ...] = ("kept", "repaired", "quarantined", "duplicate", "excluded")
IN_SHARDS: tuple[State, ...] = ("kept", "repaired")
Row = dict[str, Any]  # of the manifest, by the names below; `thumbnail` in base64

MANIFEST = pa.schema(
    [
        ("key", pa.string()),
        ("state", pa.string()),
        ("reason", pa.string()),  # codes, comma between
        ("detail", pa.string()),
        ("source", pa.string()),
        ("source_sha256", pa.string()),
        ("source_bytes", pa.int64()),
        ("label", pa.string()),
        ("artist", pa.string()),
        ("style", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("phash", pa.uint64()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("span", pa.int64()),
        ("crc32", pa.uint32()),
        ("thumbnail", pa.binary()),
    ]
)
_ROWS_AT_ONCE = 16_384
_VERSION = re.compile(r"[0-9a-f]+")
_VERSION_FILE = re.compile(r"([0-9a-f]+)\.json")
_SHARD = re.compile(r"[0-9a-f]{16}\.tar")
_compared: set[tuple[str, str]] = set()  # manifests, by URI and stamp


@dataclass(frozen=True)
class Shard:
    """`name` is the file's name below shards/."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class DatasetVersion:
    """An immutable set of shards. `books` counts images by state, and by reason within `reasons`.

    `parent`: the version that this one was made from by appending or removing. `manifest_sha256`: of its file.
    """

    root: str
    version: str
    root_hash: str
    recipe: Mapping[str, Any]
    parent: str | None
    books: Mapping[str, Any]
    manifest_sha256: str
    shards: tuple[Shard, ...]

    def samples(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of the images that are in shards, shard by shard as `shards` lists them, in the order of each tar."""
        with self._manifest_file(whole=True) as file:
            return pq.read_table(file, columns=columns, filters=[("state", "in", IN_SHARDS)])

    def rows(self) -> Iterator[Row]:
        """A row for every image found, a few thousand of them in memory at a time."""
        with self._manifest_file(whole=False) as file:
            for batch in pq.ParquetFile(file).iter_batches(_ROWS_AT_ONCE):
                yield from rows_of(batch)

    @contextlib.contextmanager
    def _manifest_file(self, *, whole: bool) -> Iterator[BinaryIO]:
        """Compared with its sha256, for Parquet does not notice a bit that is another. What is not read as a whole is
        read twice the first time.
        """
        uri = manifest_uri(self.root, self.version)
        try:
            if whole:
                data = storage.read_bytes(uri)
                self._refuse_another(uri, hashlib.sha256(data).hexdigest())
                yield io.BytesIO(data)
                return
            seen = (uri, storage.stamp_of(uri))
            with storage.open_binary(uri) as file:
                if seen not in _compared:
                    self._refuse_another(uri, hashlib.file_digest(file, "sha256").hexdigest())
                    _compared.add(seen)
                    file.seek(0)
                yield file
        except FileNotFoundError:
            raise DatasetError(f"expected the manifest {uri}, found none there; {how_to_mend(self)}") from None

    def _refuse_another(self, uri: str, sha256: str) -> None:
        if sha256 != self.manifest_sha256:
            raise DatasetError(
                f"{uri} is not the manifest that was written (its sha256 differs); delete it and {how_to_mend(self)}"
            )

    def shard_uri(self, name: str) -> str:
        return storage.join(self.root, "shards", name)


def manifest_uri(root: str, version: str) -> str:
    return storage.join(root, "manifests", f"{version}.parquet")


def version_uri(root: str, version: str) -> str:
    return storage.join(root, "versions", f"{version}.json")


def latest_uri(root: str) -> str:
    return storage.join(root, "LATEST")


def table_of(rows: Iterable[Row]) -> pa.Table:
    decoded = [{**row, "thumbnail": base64.b64decode(row["thumbnail"]) if row["thumbnail"] else None} for row in rows]
    return pa.Table.from_pylist(decoded, schema=MANIFEST)


def rows_of(table: pa.Table | pa.RecordBatch) -> Iterator[Row]:
    for row in table.to_pylist():
        thumbnail = row["thumbnail"]
        yield {**row, "thumbnail": base64.b64encode(thumbnail).decode() if thumbnail else None}


def rows_of_shard(uri: str, shard: Shard, *, first: int) -> list[Row]:
    """The rows of a shard in the order of its tar, of a manifest that is whole: of its row groups where they lie.

    Args:
        uri: of the manifest: samples come first in it, shard by shard.
        shard: as the version lists it.
        first: rows of the shards that the version lists before it.
    """
    with storage.open_binary(uri) as file:
        manifest = pq.ParquetFile(file)
        counts = (manifest.metadata.row_group(group).num_rows for group in range(manifest.num_row_groups))
        ends = list(accumulate(counts))
        groups = [g for g, end in enumerate(ends) if first < end and ([0, *ends][g] < first + shard.rows)]
        table = manifest.read_row_groups(groups)
    return list(rows_of(table.filter(pc.field("shard") == shard.name)))


def split_spec(spec: str) -> tuple[str, str]:
    """ROOT or ROOT@VERSION -> root and version, hex digits or nothing."""
    root, _, version = spec.rpartition("@")
    if not _VERSION.fullmatch(version):  # me@home may be a folder's name
        return storage.absolute(spec), ""
    return storage.absolute(root), version


def list_versions(root: str) -> list[str]:
    """Whatever else lies between them, such as what an editor left."""
    names = map(storage.name_of, storage.list_files(storage.join(root, "versions")))
    return [match[1] for name in names if (match := _VERSION_FILE.fullmatch(name))]


def latest_version(root: str) -> str | None:
    """The name that LATEST holds, if there is one."""
    try:
        return storage.read_bytes(latest_uri(root)).decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise UsageError(f"expected a dataset at {root}, found a file") from None


def open_version(spec: str) -> DatasetVersion:
    """Open ROOT or ROOT@VERSION; without a version, the one that LATEST names.

    Raises:
        UsageError: there is no dataset there, or not this version.
        DatasetError: the version's file is damaged, or was written by another release.
    """
    root, version = split_spec(spec)
    version = version or latest_version(root) or ""
    if not version:
        hint = "; a version, 16 hex digits, is named behind an @" if "@" in storage.name_of(root) else ""
        raise UsageError(
            f"expected a dataset version at {root}, found no LATEST in it; pipelines/shard.py makes one{hint}"
        )
    uri = version_uri(root, version)
    try:
        text = storage.read_bytes(uri)
    except (FileNotFoundError, ValueError):  # a damaged LATEST may hold what no file can be called
        names = ", ".join(list_versions(root)) or "none"
        raise UsageError(f"{root} has no version {ascii(version)[1:61].rstrip(chr(39))}; it has {names}") from None
    try:
        described = json.loads(text)
        schema = described["schema"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DatasetError(f"{uri}: expected the description of a dataset version, found damage") from None
    if schema != SCHEMA_NUMBER:
        raise DatasetError(
            f"{root}@{version}: expected schema {SCHEMA_NUMBER}, found {schema!r:.20}; it was written by another "
            "release, or its file is damaged: run pipelines/shard.py again"
        )
    try:
        content = {key: value for key, value in described.items() if key != "root_hash"}
        if text != _text_of(content) or described["root_hash"][:16] != version:
            raise ValueError
        opened = DatasetVersion(
            root=root,
            version=version,
            root_hash=described["root_hash"],
            recipe=described["recipe"],
            parent=described["parent"],
            books=described["books"],
            manifest_sha256=described["manifest_sha256"],
            shards=tuple(Shard(**shard) for shard in described["shards"]),
        )
    except (KeyError, TypeError, ValueError):
        raise DatasetError(f"{uri}: its content is not what its root hash was taken of; the file is damaged") from None
    for shard in opened.shards:
        if not _SHARD.fullmatch(shard.name):
            # Readers keep copies under this name: one that climbs was given by somebody who means harm.
            raise DatasetError(f"{uri}: expected the name of a file below shards/, found {shard.name!r}")
    return opened


def lineage(version: DatasetVersion) -> Iterator[DatasetVersion]:
    """The version itself, its parent, and so on as far as they are still there."""
    while True:
        yield version
        if version.parent is None or not storage.exists(version_uri(version.root, version.parent)):
            return
        version = open_version(f"{version.root}@{version.parent}")


def how_to_mend(version: DatasetVersion) -> str:
    """The commands that make a version's files again, each with the version that it was given then."""
    try:
        *later, first = lineage(version)
    except DatasetError as error:  # which must not hide what is to be mended
        return f"copy it from a backup: of what it was made from, too, something is damaged: {error}"
    if first.parent is not None:
        return f"copy it from a backup: version {first.parent}, which it was made from, is gone"
    told = "run pipelines/shard.py with the same sources"
    if later:
        of = ", ".join(f"--dataset {version.root}@{one.parent}" for one in reversed(later))
        told += f", then the appends and removes that followed, in their order, with {of}"
    return f"{told}: what is missing is made again, byte for byte"


def require_shards(version: DatasetVersion) -> None:
    """Refuse to go on from a version that is not all there: the next one would need what is missing.

    Raises:
        DatasetError: shards are not there, or not as long as they were written.
    """
    absent = absent_shards(version.root, version.shards)
    if absent:
        raise DatasetError(
            f"{len(absent)} of {len(version.shards)} shards of {version.root}@{version.version} are not there, or were "
            f"cut, the first {absent[0].name}; delete those and {how_to_mend(version)}"
        )


def publish_version(
    root: str,
    *,
    recipe: Mapping[str, Any],
    shards: Sequence[Shard],
    rows: Iterable[Row],
    found: int | None = None,
    after: str | None,
    parent: DatasetVersion | None = None,
) -> DatasetVersion:
    """Close the books and publish: manifest, version, LATEST. The same content gives the same name and bytes.

    Args:
        root: of the dataset.
        recipe: all that determines the bytes of a shard besides the images.
        shards: of the version, in order.
        rows: for every image found; those of shards first, in their order and each tar's. Taken one at a time.
        found: how many rows there are to be: images that were listed, and those of the parent. None: not known.
        after: what LATEST said when the job began.
        parent: what this version was made from.

    Raises:
        DatasetError: the books do not balance: the manifest's rows and the shards' disagree; a shard is not there; or
            another job published meanwhile.
    """
    books = Books(shards, found)
    with scratch_folder("manifest") as scratch, storage.full_disk_named(str(scratch)):
        path = scratch / "manifest.parquet"
        with pq.ParquetWriter(path, MANIFEST, compression="zstd") as writer:
            counted = map(books.count, rows)
            while some := list(islice(counted, _ROWS_AT_ONCE)):
                writer.write_table(table_of(some))
        with path.open("rb") as file:
            manifest_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        content = {
            "schema": SCHEMA_NUMBER,
            "recipe": dict(recipe),
            "parent": parent.version if parent else None,
            "books": books.close(),
            "manifest_sha256": manifest_sha256,
            "shards": [asdict(shard) for shard in shards],
        }
        text = _text_of(content)
        version = _root_hash_of(content)[:16]
        _refuse_overtaken(root, after, version)
        storage.publish_file(path, manifest_uri(root, version))
    _refuse_absent(root, shards)  # as late as can be: from here on the version keeps them from being collected
    _refuse_overtaken(root, after, version)  # again: the manifest may have taken minutes
    storage.publish_bytes(version_uri(root, version), text)
    advance_latest(root, version)
    return open_version(f"{root}@{version}")


def advance_latest(root: str, version: str) -> None:
    """Let LATEST name a version, unless the one that it names descends from it: that one has what came after."""
    latest = latest_version(root)
    try:
        newest = open_version(f"{root}@{latest}") if latest and latest != version else None
    except (DatasetError, UsageError):  # damaged, or not there
        newest = None
    if newest and open_version(f"{root}@{version}").parent != latest:  # else no ancestor need be read, as nearly always
        try:
            above = {name for one in lineage(newest) for name in (one.version, one.parent)}
        except (DatasetError, UsageError) as error:
            log.warning("LATEST stays version %s: what that was made from cannot be read: %s", latest, error)
            return
        if version in above:
            log.info("LATEST stays version %s, which was made from version %s", latest, version)
            return
    storage.publish_bytes(latest_uri(root), version.encode())


def move_latest(root: str, version: str, *, after: str | None) -> None:
    """Let LATEST name another version that is there, if it still says what it did when this was decided.

    Raises:
        DatasetError: another job published meanwhile.
    """
    _refuse_overtaken(root, after, version)
    storage.publish_bytes(latest_uri(root), version.encode())


def absent_shards(root: str, shards: Iterable[Shard]) -> list[Shard]:
    """Those that are not there, or not as long as they were written."""
    sizes = {entry.path: entry.bytes for entry in storage.walk(storage.join(root, "shards"))}
    return [shard for shard in shards if sizes.get(shard.name) != shard.bytes]


def _refuse_overtaken(root: str, after: str | None, version: str) -> None:
    """Two jobs that add to the same version would each leave out what the other added."""
    latest = latest_version(root)
    if latest not in (after, version):
        raise DatasetError(
            f"another job published version {latest} of {root} while this one ran; expected LATEST to be "
            f"{after or 'absent'} still. Nothing was published; the same command goes on from there"
        )


def _refuse_absent(root: str, shards: Sequence[Shard]) -> None:
    """Whatever was deleted while a job ran, such as a parent's shards, is in no version that is published."""
    absent = absent_shards(root, shards)
    if absent:
        raise DatasetError(
            f"{len(absent)} of {len(shards)} shards are not below {root} any more, the first {absent[0].name}: they "
            "were deleted while this job ran. Nothing was published; the same command makes its own again"
        )


class Books:
    """Counts by state and by reason; every image found has exactly one state, and every sample lies in a shard."""

    def __init__(self, shards: Sequence[Shard], listed: int | None = None) -> None:
        self._shards, self._listed = shards, listed
        self._position = {shard.name: index for index, shard in enumerate(shards)}
        self._in_shard = dict.fromkeys(self._position, 0)
        self._last = (-1, -1)
        self._states: dict[str, int] = dict.fromkeys(STATES, 0)
        self._reasons: dict[str, int] = {}
        self._found = 0

    def count(self, row: Row) -> Row:
        """Enter a row, which is returned as it is.

        Raises:
            DatasetError: it is out of order, or of a shard that is none of the version's.
        """
        self._found += 1
        if row["state"] in self._states:
            self._states[row["state"]] += 1
        for reason in filter(None, row["reason"].split(",")):
            self._reasons[reason] = self._reasons.get(reason, 0) + 1
        if row["state"] in IN_SHARDS:
            place = (self._position.get(row["shard"], -1), row["offset"] or 0)
            if place <= self._last:
                raise DatasetError(f"the books do not balance: {row['source']} is not where the shards' order puts it")
            self._last = place
            self._in_shard[row["shard"]] += 1
        return row

    def close(self) -> dict[str, Any]:
        """The books.

        Raises:
            DatasetError: they do not balance.
        """
        books = {"found": self._found, **self._states, "reasons": dict(sorted(self._reasons.items()))}
        if self._found != sum(self._states.values()):
            raise DatasetError(f"the books do not balance: {books}")
        if self._listed not in (None, self._found):
            raise DatasetError(
                f"the books do not balance: {self._listed} images were listed, {self._found} are told of"
            )
        for shard in self._shards:
            if self._in_shard[shard.name] != shard.rows:
                raise DatasetError(
                    f"the books do not balance: {shard.name} holds {shard.rows} samples, the manifest lists "
                    f"{self._in_shard[shard.name]}"
                )
        return books


def _root_hash_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _text_of(content: Mapping[str, Any]) -> bytes:
    return json.dumps({**content, "root_hash": _root_hash_of(content)}, indent=2, sort_keys=True).encode()
