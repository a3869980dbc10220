"""Which listing and recipe gave which version: a finished build is recognised without a look into its images."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaconv import storage
from adaconv.data.ingest import MENDABLE
from adaconv.data.manifest import (
    DatasetVersion,
    absent_shards,
    advance_latest,
    latest_version,
    manifest_uri,
    open_version,
    version_uri,
)
from adaconv.data.sources import Found, fingerprint, read_found
from adaconv.errors import UsageError
from adaconv.images import ImageError
from adaconv.progress import Progress

log = logging.getLogger(__name__)

_CHUNK_IMAGES = 512


@dataclass(frozen=True)
class Listing:
    """Files that were found, spilled to `folder` in chunks (name -> files); the fingerprint ignores their order."""

    folder: Path
    chunks: Mapping[str, int]
    images: int
    bytes: int
    fingerprint: str

    def build(self, recipe: Mapping[str, Any], parent: str | None) -> str:
        """Name of the build of these files by a recipe, as an addition to a parent or as a version of its own."""
        text = json.dumps([self.fingerprint, recipe, parent], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def files(self) -> Iterator[Found]:
        for name in self.chunks:
            with (self.folder / f"{name}.jsonl").open() as lines:
                yield from (Found.from_json(json.loads(line)) for line in lines)


def spill_listing(found: Iterable[Found], folder: Path) -> Listing:
    """Write a listing to files of some hundred lines of JSON, so that memory does not grow with it."""
    chunks: dict[str, int] = {}
    counted = {"images": 0, "bytes": 0}
    lines: list[str] = []
    progress = Progress("list")

    def spill() -> None:
        text = "".join(lines).encode()
        name = hashlib.sha256(text).hexdigest()[:24]
        if name in chunks:  # a folder that was given twice
            name = hashlib.sha256(f"{name} {len(chunks)}".encode()).hexdigest()[:24]
        with storage.full_disk_named(str(folder)):
            (folder / f"{name}.jsonl").write_bytes(text)
        chunks[name] = len(lines)
        progress.advance(len(lines))
        lines.clear()

    def passing() -> Iterator[Found]:
        for one in found:
            counted["images"] += 1
            counted["bytes"] += one.bytes
            lines.append(json.dumps(one) + "\n")
            if len(lines) == _CHUNK_IMAGES:
                spill()
            yield one
        if lines:
            spill()

    digest = fingerprint(passing())
    return Listing(folder, chunks, counted["images"], counted["bytes"], digest)


def note_build(root: str, build: str, version: DatasetVersion) -> None:
    storage.publish_bytes(_note_uri(root, build), json.dumps({"version": version.version}).encode())


def built_version(root: str, build: str) -> DatasetVersion | None:
    """The version that a build gave, if its manifest is whole; shards may be lost."""
    name = _noted(root, build)
    if name is None or not storage.exists(version_uri(root, name)) or not storage.exists(manifest_uri(root, name)):
        return None
    version = open_version(f"{root}@{name}")
    manifest = storage.read_bytes(manifest_uri(root, name))
    if hashlib.sha256(manifest).hexdigest() != version.manifest_sha256:
        return None  # damaged: made again
    return version


def finished_version(root: str, build: str) -> DatasetVersion | None:
    """The version that a build gave, if all of it is there. LATEST is moved to it, unless it descends from it."""
    version = built_version(root, build)
    if version is None or absent_shards(root, version.shards):
        return None
    advance_latest(root, version.version)
    return version


def whole_version(
    root: str, listing: Listing, recipe: Mapping[str, Any], parent: str | None = None
) -> DatasetVersion | None:
    """The version that these images gave, unless one that could not be read then can be read now.

    It is made again only while it is LATEST: what was made of it since would be left behind.

    Raises:
        UsageError: it was deleted, and LATEST is another one than it or its parent.
    """
    build = listing.build(recipe, parent)
    _refuse_to_go_back(root, build, parent)
    version = finished_version(root, build)
    if version is None or not MENDABLE & version.books["reasons"].keys():
        return version

    def files(*, unread: bool) -> Iterator[tuple[str, int]]:
        return ((row["source"], row["source_bytes"]) for row in version.rows() if (row["reason"] in MENDABLE) == unread)

    unread = set(files(unread=True))
    unread.difference_update(files(unread=False))  # what a parent could not read, and a later one could
    for found in (one for one in listing.files() if (one.source, one.bytes) in unread):
        try:
            read_found(found, max_bytes=int(recipe["max_megabytes"] * 1e6))
        except ImageError:
            continue
        log.info("%s could not be read for version %s, and can be read now", found.source, version.version)
        if latest_version(root) == version.version:
            return None
        log.info("LATEST is another version: pipelines/dataset.py append adds what can be read now")
        return version
    return version


def _refuse_to_go_back(root: str, build: str, parent: str | None) -> None:
    """Where `gc` deleted what LATEST descends from, nobody can tell any more that it does."""
    name, latest = _noted(root, build), latest_version(root)
    if name is not None and latest not in (None, name, parent) and not storage.exists(version_uri(root, name)):
        raise UsageError(
            f"{root}: these images gave version {name}, which was deleted since, and LATEST is {latest}. Made again it "
            "may take LATEST's place, with what was removed. pipelines/dataset.py append adds what is new; to have "
            f"it made nevertheless, give another output or delete {_note_uri(root, build)}"
        )


def result_of(version: DatasetVersion) -> dict[str, Any]:
    """What result.json says of a version."""
    return {
        "root": version.root,
        "version": version.version,
        "root_hash": version.root_hash,
        "parent": version.parent,
        "shards": len(version.shards),
        "bytes": sum(shard.bytes for shard in version.shards),
        "books": dict(version.books),
    }


def _noted(root: str, build: str) -> str | None:
    """The version that a build gave once."""
    try:
        name: str = json.loads(storage.read_bytes(_note_uri(root, build)))["version"]
    except FileNotFoundError:
        return None
    return name


def _note_uri(root: str, build: str) -> str:
    return storage.join(root, "builds", f"{build}.json")
