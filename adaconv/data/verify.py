"""Every byte of a dataset version against its hash, and where the damage is."""

import hashlib
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adaconv import storage
from adaconv.data.manifest import HEADER_BYTES, DatasetVersion, Row, Shard, manifest_uri
from adaconv.errors import DatasetError


@dataclass(frozen=True)
class Damage:
    """`file` below the root; `key` and `source` of the sample that is hit, if it is one; bytes `start` to `end`."""

    file: str
    what: str
    key: str = ""
    source: str = ""
    start: int = 0
    end: int = 0

    def __str__(self) -> str:
        place = f", bytes {self.start} to {self.end}" if self.end else ""
        sample = f", sample {self.key} ({self.source})" if self.key else ""
        return f"{self.file}{place}{sample}: {self.what}"


def verify_manifest(version: DatasetVersion) -> list[Damage]:
    """The manifest's file against the version's."""
    file = f"manifests/{version.version}.parquet"
    try:
        data = storage.read_bytes(manifest_uri(version.root, version.version))
    except FileNotFoundError:
        return [Damage(file, "it is not there")]
    if hashlib.sha256(data).hexdigest() != version.manifest_sha256:
        return [Damage(file, f"its {len(data)} bytes are not those that were published")]
    return []


def verify_shard(root: str, shard: Shard, rows_of_shard: Callable[[], Sequence[Row] | None]) -> list[Damage]:
    """A shard against its hash and, where that differs, each of its samples against their own.

    Args:
        root: of the dataset.
        shard: as the version lists it.
        rows_of_shard: gives the manifest's rows of this shard, in the order of the tar, or None where the manifest is
            damaged; asked only if something is wrong.
    """
    file = f"shards/{shard.name}"
    uri = storage.join(root, file)
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError:
        return [Damage(file, f"it is not there; {shard.rows} samples are gone", end=shard.bytes)]
    if hashlib.sha256(data).hexdigest() == shard.sha256:
        return []
    rows, found = rows_of_shard(), []
    if len(data) != shard.bytes:
        what = f"expected {shard.bytes} bytes, found {len(data)}"
        found.append(Damage(file, what, start=min(len(data), shard.bytes), end=shard.bytes))
    end = 0
    for row in rows or ():
        start, end = row["offset"] - HEADER_BYTES, row["offset"] - HEADER_BYTES + row["span"]
        if zlib.crc32(data[start:end]) != row["crc32"]:
            what = "it is gone" if start >= len(data) else "it is cut" if end > len(data) else "its bytes have changed"
            found.append(Damage(file, what, row["key"], row["source"], start, end))
    if not found:
        what = "the end of the archive has changed" if rows else "its bytes have changed; the manifest would say where"
        found.append(Damage(file, what, start=end, end=shard.bytes))
    return found


def check_span(uri: str, row: Row, span: bytes) -> None:
    """A sample's bytes in a tar against the manifest.

    Raises:
        DatasetError: they have changed.
    """
    if len(span) != row["span"] or zlib.crc32(span) != row["crc32"]:
        raise DatasetError(
            f"{uri}: the bytes of sample {row['key']} ({row['source']}) are not those that were written; "
            "`pipelines/dataset.py verify` tells all that is damaged"
        )
    assert len(span) % tarfile.BLOCKSIZE == 0
