"""Which image goes into which shard: a pure function of what was found, whatever the order it was found in.

Catalog        every image that was found, sorted on disk, so that memory does not grow with their number
plan_shards    candidates in the order of their keys -> shards of about the target size, one at a time
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

import xxhash

from adaconv.config.shard import RecipeConfig
from adaconv.data.disk_tables import DiskTables
from adaconv.data.ingest import MENDABLE, key_of, stored_size
from adaconv.data.manifest import IN_SHARDS, Row
from adaconv.data.sources import Found

_TAR_OVERHEAD_BYTES = 2560  # two headers, the json and the padding of both members
_JPEG_BYTES_PER_PIXEL = 0.45  # of quality 95 without chroma subsampling, about


class Candidate(NamedTuple):
    """An image whose header was read, and where it is read from again. Width and height as stored there.

    `xxh3`: 128 bits in hex, by which bytes that are read again are told to be those of `sha256`, in a twentieth of its
    time.
    """

    key: str
    sha256: str
    xxh3: str
    found: Found
    width: int
    height: int

    @classmethod
    def of(cls, found: Found, data: bytes, *, width: int = 0, height: int = 0) -> Self:
        """A candidate from its file's bytes; one whose header cannot be read has no size."""
        sha256 = hashlib.sha256(data).hexdigest()
        return cls(key_of(sha256), sha256, xxhash.xxh3_128_hexdigest(data), found, width, height)

    @classmethod
    def from_json(cls, values: list[Any]) -> Self:
        key, sha256, xxh3, found, width, height = values
        return cls(key, sha256, xxh3, Found.from_json(found), width, height)

    def is_of(self, data: bytes) -> bool:
        """Whether a file that is read again has the same bytes."""
        return xxhash.xxh3_128_hexdigest(data) == self.xxh3

    @property
    def source(self) -> str:
        return self.found.source


@dataclass(frozen=True)
class ShardPlan:
    candidates: tuple[Candidate, ...]

    def to_json(self) -> str:
        return json.dumps(self.candidates)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        return cls(tuple(map(Candidate.from_json, json.loads(text))))


def row_of(candidate: Candidate, state: str, reason: str = "") -> Row:
    """A manifest row of an image that is in no shard (yet)."""
    return {
        "key": candidate.key,
        "state": state,
        "reason": reason,
        "detail": "",
        "source": candidate.source,
        "source_sha256": candidate.sha256,
        "source_bytes": candidate.found.bytes,
        "label": candidate.found.label,
        "artist": candidate.found.artist,
        "style": candidate.found.style,
        "width": candidate.width,
        "height": candidate.height,
        "phash": None,
        "shard": None,
        "offset": None,
        "size": None,
        "span": None,
        "crc32": None,
        "thumbnail": None,
    }


class Catalog:
    """Candidates of a build, and manifest rows of the images that are in no shard.

    Text goes through JSON, which writes whatever a file system may have for names in plain ASCII.
    """

    def __init__(self, path: Path) -> None:
        self._rows = DiskTables(
            path,
            "CREATE TABLE candidate (key TEXT, source TEXT, json TEXT);"
            "CREATE TABLE outside (source TEXT, sha256 TEXT, json TEXT);"
            "CREATE TABLE known (source TEXT, sha256 TEXT, unread INT, PRIMARY KEY (source, sha256)) WITHOUT ROWID;"
            "CREATE TABLE taken (key TEXT PRIMARY KEY, state TEXT) WITHOUT ROWID;"
            "CREATE TABLE unwanted (key TEXT, source TEXT, PRIMARY KEY (key, source)) WITHOUT ROWID;",
        )
        self.has_news = False
        self.known = 0  # images that the parent has found already
        self.left_in_parent = 0  # excluded images that lie in a shard of the parent

    def add_parent(self, rows: Iterable[Row]) -> None:
        """Take over what a version has found: its images are not found again, and what it removed stays removed."""
        for row in rows:
            if row["state"] not in IN_SHARDS:
                self._insert_outside(row)
            unread = row["reason"] in MENDABLE
            insert = "INSERT OR IGNORE" if unread else "INSERT OR REPLACE"
            name = (row["source"], row["source_sha256"])
            self._rows.execute(f"{insert} INTO known VALUES (?, ?, ?)", (*name, unread))
            if row["state"] in (*IN_SHARDS, "excluded"):
                self._rows.execute("INSERT OR IGNORE INTO taken VALUES (?, ?)", (row["key"], row["state"]))

    def add(self, candidate: Candidate) -> None:
        """Enter an image, unless the parent has it: then it is the same file, or a duplicate, or was removed there.

        What could not be read again when the parent was written is none that it has.
        """
        if self._is_known(candidate.source, candidate.sha256, "AND NOT unread"):
            self.known += 1
            return
        self.has_news = True
        taken = self._taken_as(candidate)
        if taken is None:
            text = json.dumps(candidate)
            self._rows.execute("INSERT INTO candidate VALUES (?, ?, ?)", (candidate.key, candidate.source, text))
        elif taken == "excluded":
            self._insert_outside(row_of(candidate, "excluded", "removed_before"))
        else:
            self._insert_outside(row_of(candidate, "duplicate", "same_bytes"))

    def exclude(self, candidate: Candidate, reason: str, detail: str) -> None:
        """Enter an image that is to get into no shard, whatever else is to be said of it."""
        self.left_in_parent += self._taken_as(candidate) in IN_SHARDS
        if self.set_outside({**row_of(candidate, "excluded", reason), "detail": detail}):
            self._rows.execute("INSERT OR IGNORE INTO unwanted VALUES (?, ?)", (candidate.key, candidate.source))

    def _taken_as(self, candidate: Candidate) -> str | None:
        """The state that an image of the same bytes has in the parent."""
        row = self._rows.execute("SELECT state FROM taken WHERE key = ?", (candidate.key,)).fetchone()
        return row[0] if row else None

    def exclude_copies(self) -> None:
        """Once all images are entered: those that have the bytes of an excluded one are excluded with it."""
        copies = self._rows.execute(
            "SELECT json, (SELECT min(source) FROM unwanted WHERE unwanted.key = candidate.key) AS named"
            " FROM candidate WHERE named IS NOT NULL"
        )
        for text, named in copies:
            row = row_of(Candidate.from_json(json.loads(text)), "excluded", "excluded_with_a_copy")
            self._insert_outside({**row, "detail": f"it has the bytes of {named}"})
        self._rows.execute("DELETE FROM candidate WHERE key IN (SELECT key FROM unwanted)")

    def set_outside(self, row: Row) -> bool:
        """Enter the manifest row of an image that no shard holds; whether it is news to the parent."""
        if self._is_known(row["source"], row["source_sha256"]):
            self.known += 1
            return False
        self.has_news = True
        self._insert_outside(row)
        return True

    def outside_examples(self, count: int) -> list[Row]:
        """Some refused images, for messages."""
        rows = self._rows.execute("SELECT json FROM outside ORDER BY rowid DESC")
        refused = (row for (text,) in rows if (row := json.loads(text))["state"] == "quarantined")
        return list(islice(refused, count))

    def candidates(self) -> Iterator[Candidate]:
        """By key, then by source."""
        for (text,) in self._rows.execute("SELECT json FROM candidate ORDER BY key, source, json"):
            yield Candidate.from_json(json.loads(text))

    def outside(self) -> Iterator[Row]:
        """By source, then by content."""
        for (text,) in self._rows.execute("SELECT json FROM outside ORDER BY source, sha256, json"):
            yield json.loads(text)

    def close(self) -> None:
        self._rows.close()

    def _insert_outside(self, row: Row) -> None:
        self._rows.execute(
            "INSERT INTO outside VALUES (?, ?, ?)", (row["source"], row["source_sha256"], json.dumps(row))
        )

    def _is_known(self, source: str, sha256: str, more: str = "") -> bool:
        found = self._rows.execute(f"SELECT 1 FROM known WHERE source = ? AND sha256 = ? {more}", (source, sha256))
        return found.fetchone() is not None


def plan_shards(
    candidates: Iterable[Candidate], recipe: RecipeConfig, *, duplicate: Callable[[Candidate], None]
) -> Iterator[ShardPlan]:
    """Cut images, sorted by key and source, into shards of about the target size.

    Keys are hashes, so their order is a shuffle that depends on nothing else. Of images with the same bytes the first
    by source stays.

    Args:
        candidates: as Catalog.candidates gives them.
        recipe: the target size, and how large images become.
        duplicate: told of each image that is left out since another has the same bytes.
    """
    members: list[Candidate] = []
    filled = 0
    last = ""
    for candidate in candidates:
        if candidate.key == last:
            duplicate(candidate)
            continue
        last = candidate.key
        size = expected_bytes(candidate, recipe)
        if members and filled + size > recipe.target_mb * 1e6:
            yield ShardPlan(tuple(members))
            members, filled = [], 0
        members.append(candidate)
        filled += size
    if members:
        yield ShardPlan(tuple(members))


def expected_bytes(candidate: Candidate, recipe: RecipeConfig) -> int:
    """Bytes that an image is expected to take in a tar; exact where it keeps its own."""
    size = stored_size(candidate.width, candidate.height, recipe)
    if size == (candidate.width, candidate.height):
        return candidate.found.bytes + _TAR_OVERHEAD_BYTES
    return int(size[0] * size[1] * _JPEG_BYTES_PER_PIXEL) + _TAR_OVERHEAD_BYTES
