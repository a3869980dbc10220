"""One shard: its tar, its manifest rows, the refused images with their reasons. The unit of commit."""

import base64
import hashlib
import json
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import BinaryIO

from adaconv import storage
from adaconv.data.ingest import Refusal, Sample, refusal_of
from adaconv.data.manifest import HEADER_BYTES, Row, Shard
from adaconv.data.plan import Candidate, ShardPlan, row_of
from adaconv.data.sources import Found, read_found
from adaconv.data.verify import check_span
from adaconv.images import ImageError

Ingest = Callable[[bytes, str], Sample | Refusal]
Told = Callable[[int, int, int], None]  # images, bytes read, images refused since it was last called


def write_shard(
    plan: ShardPlan, root: str, ingest: Ingest, told: Told = lambda images, bytes_read, refused: None
) -> tuple[Shard | None, list[Row]]:
    """Ingest a shard's images and publish its tar under the name of its content.

    Args:
        plan: of the shard.
        root: of the dataset.
        ingest: (bytes, name) -> sample or refusal.
        told: is told of each image.

    Returns:
        the shard, or None if every image was refused; and a manifest row for each image.
    """
    rows, samples = [], []
    folder = storage.join(root, "shards")
    with storage.file_for(folder) as path:
        with path.open("wb") as file:
            tar = _Tar(file)
            read = read_ahead([candidate.found for candidate in plan.candidates])
            for candidate, data in zip(plan.candidates, read, strict=True):
                row = _write_sample(tar, candidate, data, ingest)
                rows.append(row)
                if row["state"] != "quarantined":
                    samples.append(row)
                told(1, candidate.found.bytes, row["state"] == "quarantined")
            tar.end()
        if not samples:
            return None, rows
        shard = tar.shard_of(samples)
        storage.publish_written(path, storage.join(folder, shard.name))
    return shard, rows


def rewrite_shard(root: str, rows: Sequence[Row]) -> Shard:
    """Publish a shard of some samples of another one, whose rows, in the order of the tar, are changed accordingly.

    A sample's bytes in a tar stand for themselves, so they are copied; the result is what writing these samples anew
    would have given.

    Raises:
        DatasetError: the old shard is not what its rows say.
    """
    folder = storage.join(root, "shards")
    old = storage.join(folder, rows[0]["shard"])
    with storage.file_for(folder) as path:
        with path.open("wb") as file:
            tar = _Tar(file)
            for row in rows:
                span = storage.read_range(old, row["offset"] - HEADER_BYTES, row["span"])
                check_span(old, row, span)
                row["offset"] = tar.size + HEADER_BYTES
                tar.write(span)
            tar.end()
        shard = tar.shard_of(rows)
        storage.publish_written(path, storage.join(folder, shard.name))
    return shard


class _Tar:
    """A tar that is written from start to end, and named by what went into it: to read it again costs as much.

    `tarfile.TarFile` takes twice the time, for it copies a member by way of a file. `size`: bytes so far.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.size = file, 0
        self._sha256, self._crc32 = hashlib.sha256(), 0

    def add(self, name: str, data: bytes) -> None:
        """A member as webdataset.TarWriter writes it, byte for byte, with a header that says nothing of time or
        machine. Importing that library takes a worker three seconds and 200 MB, for it brings torch.
        """
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(data), 0o644
        # The names are of a kind that all of tar's formats write alike, and this one takes the least time.
        self.write(member.tobuf(tarfile.USTAR_FORMAT))
        self.write(data)
        self.write(bytes(-len(data) % tarfile.BLOCKSIZE))

    def end(self) -> None:
        self.write(bytes(2 * tarfile.BLOCKSIZE))
        self.write(bytes(-self.size % tarfile.RECORDSIZE))

    def write(self, data: bytes) -> None:
        self._sha256.update(data)
        self._crc32 = zlib.crc32(data, self._crc32)
        self.size += len(data)
        self._file.write(data)

    def crc32_since(self) -> int:
        """Of what was written since this was asked last."""
        crc32, self._crc32 = self._crc32, 0
        return crc32

    def shard_of(self, rows: Sequence[Row]) -> Shard:
        """What was written, as a shard of these samples; its name is entered into their rows."""
        sha256 = self._sha256.hexdigest()
        shard = Shard(f"{sha256[:16]}.tar", rows=len(rows), bytes=self.size, sha256=sha256)
        for row in rows:
            row["shard"] = shard.name
        return shard


def read_ahead(found: Iterable[Found], *, max_bytes: int | None = None) -> Iterator[bytes | ImageError]:
    """The bytes of each, in order, or why they cannot be had; a few are fetched at once from an object store."""
    read = partial(_read, max_bytes=max_bytes)
    files = iter(found)
    first = next(files, None)
    if first is None:
        return
    yield from storage.few_at_once(read, chain((first,), files), where=first.uri)


def refused_row(candidate: Candidate, refusal: Refusal) -> Row:
    thumbnail = base64.b64encode(refusal.thumbnail).decode() if refusal.thumbnail else None
    return {**row_of(candidate, "quarantined", refusal.reason), "detail": refusal.detail, "thumbnail": thumbnail}


def _read(found: Found, max_bytes: int | None) -> bytes | ImageError:
    try:
        return read_found(found, max_bytes=max_bytes)
    except ImageError as error:
        return error


def _write_sample(tar: _Tar, candidate: Candidate, data: bytes | ImageError, ingest: Ingest) -> Row:
    if isinstance(data, bytes) and not candidate.is_of(data):
        data = ImageError("changed", "its bytes are not those that were there when the job began")
    answer = refusal_of(data) if isinstance(data, ImageError) else ingest(data, candidate.source)
    if isinstance(answer, Refusal):
        return refused_row(candidate, answer)
    described = {
        "source": candidate.source,
        "source_sha256": candidate.sha256,
        "label": candidate.found.label,
        "artist": candidate.found.artist,
        "style": candidate.found.style,
        "source_size": [candidate.width, candidate.height],
    }
    start = tar.size
    tar.add(f"{candidate.key}.jpg", answer.jpeg)
    tar.add(f"{candidate.key}.json", json.dumps(described, sort_keys=True, ensure_ascii=False).encode())
    return {
        **row_of(candidate, "repaired" if answer.repairs else "kept", ",".join(answer.repairs)),
        "width": answer.width,
        "height": answer.height,
        "phash": answer.phash,
        "offset": start + HEADER_BYTES,
        "size": len(answer.jpeg),
        "span": tar.size - start,
        "crc32": tar.crc32_since(),
    }
