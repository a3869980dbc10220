"""From one version to another: what a removal leaves, how two versions differ, what no version needs."""

import heapq
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby, islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from adaconv import storage
from adaconv.data.manifest import (
    IN_SHARDS,
    DatasetVersion,
    Row,
    absent_shards,
    how_to_mend,
    latest_version,
    lineage,
    list_versions,
    move_latest,
    open_version,
    split_spec,
)
from adaconv.data.verify import verify_manifest
from adaconv.errors import AdaConvError, DatasetError, UsageError

_EXAMPLES = 20  # sources that a difference names


def excluded(row: Row, reason: str, why: str) -> Row:
    """The row of an image that was taken out: what it was stays, where it lay goes."""
    nowhere = dict.fromkeys(("shard", "offset", "size", "span", "crc32"))
    return {**row, **nowhere, "state": "excluded", "reason": reason, "detail": why}


def by_shard(rows: Iterable[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows of samples, shard by shard in the manifest's order."""
    name, mine = "", list[Row]()
    for row in rows:
        if row["state"] not in IN_SHARDS:
            continue
        if row["shard"] != name:
            if mine:
                yield name, mine
            name, mine = row["shard"], []
        mine.append(row)
    if mine:
        yield name, mine


def diff(new: DatasetVersion, old: DatasetVersion) -> dict[str, Any]:
    """How a version differs from another: samples, states and bytes, with the sources of a few."""
    tables = {name: version.samples(["key", "source"]) for name, version in (("new", new), ("old", old))}
    there = {name: set(table["key"].to_pylist()) for name, table in tables.items()}
    shards = {name: {s.name: s.bytes for s in v.shards} for name, v in (("new", new), ("old", old))}
    shared = shards["new"].keys() & shards["old"].keys()

    def sources(name: str, keys: set[str]) -> list[str]:
        chosen = tables[name].filter(pc.is_in(tables[name]["key"], pa.array(keys, pa.string())))
        return heapq.nsmallest(_EXAMPLES, chosen["source"].to_pylist())

    added, removed = there["new"] - there["old"], there["old"] - there["new"]
    return {
        "added": len(added),
        "removed": len(removed),
        "kept": len(there["new"] & there["old"]),
        "added_sources": sources("new", added),
        "removed_sources": sources("old", removed),
        "shards_shared": len(shared),
        "shards_new": len(shards["new"]) - len(shared),
        "bytes_shared": sum(shards["new"][name] for name in shared),
        "bytes_new": sum(size for name, size in shards["new"].items() if name not in shared),
        "books": {"new": dict(new.books), "old": dict(old.books)},
        "recipe_differs": {
            name: [old.recipe.get(name), new.recipe.get(name)]
            for name in sorted({*old.recipe, *new.recipe})
            if old.recipe.get(name) != new.recipe.get(name)
        },
    }


def describe_versions(root: str) -> list[dict[str, Any]]:
    """What there is of each version, in the order of their files' times.

    Raises:
        UsageError: there is none.
    """
    root = _whole(root, "versions")
    latest = latest_version(root)
    there = {f"{name}.json" for name in list_versions(root)}
    files = [entry for entry in storage.walk(storage.join(root, "versions")) if entry.path in there]
    if not files:
        raise UsageError(f"expected a dataset at {root}, found no version in it")
    described = []
    for file in sorted(files, key=lambda entry: (entry.changed, entry.path)):
        name = file.path.removesuffix(".json")
        written = datetime.fromtimestamp(file.changed, UTC).isoformat(timespec="seconds")
        told = {"version": name, "written": written, "latest": name == latest}
        try:
            version = open_version(f"{root}@{name}")
        except AdaConvError as error:
            described.append({**told, "error": str(error)})
            continue
        images = sum(version.books[state] for state in IN_SHARDS)
        size = sum(shard.bytes for shard in version.shards)
        described.append(
            {**told, "parent": version.parent, "images": images, "shards": len(version.shards), "bytes": size}
        )
    return described


def roll_back(root: str, to: str) -> str | None:
    """Let LATEST name a version that is there, all of it, and return what it named before. No version is touched.

    Raises:
        UsageError, DatasetError: as `require_whole`, or another job published meanwhile.
    """
    before = latest_version(split_spec(root)[0])
    version = require_whole(root, to)
    move_latest(version.root, to, after=before)
    return before


def require_whole(root: str, name: str) -> DatasetVersion:
    """A version of which every file is there.

    Raises:
        UsageError: there is no such version.
        DatasetError: a file is missing, or is not as long as it was written.
    """
    version = open_version(f"{_whole(root, 'rollback')}@{name}")
    wrong = [str(damage) for damage in verify_manifest(version)]
    wrong += [
        f"shards/{shard.name}: it is not there, or was cut" for shard in absent_shards(version.root, version.shards)
    ]
    if wrong:
        raise DatasetError(
            f"{version.root}@{name} is not whole: {len(wrong)} of {len(version.shards) + 1} files, the first is "
            f"{wrong[0]}. Delete them and {how_to_mend(version)}"
        )
    return version


def _whole(root: str, command: str) -> str:
    root, named = split_spec(root)
    if named:
        raise UsageError(f"{command} works on a whole dataset: give --dataset {root}, without @{named}")
    return root


# Versions first, so that none is left half there; notes of shards before the shards, so that no job trusts them.
_ORDER = ("versions", "manifests", "builds", "work", "shards")


@dataclass(frozen=True)
class Garbage:
    """What goes: versions, and files by URI with their bytes. Versions go first, so that none is left half there.

    `uploads`: to an object store, that were begun and never ended.
    """

    root: str
    versions: tuple[str, ...]
    files: tuple[storage.Entry, ...]
    uploads: tuple[storage.Entry, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.files)


def find_garbage(root: str, *, keep_last: int | None, older_than_hours: float) -> Garbage:
    """Files below a root that no version needs, old enough to be of no job that runs.

    Notes of builds stay: by them a command that gave a deleted version is known, which would bring back what it held.

    Raises:
        UsageError: there is no dataset.
        DatasetError: a version's file is damaged: what it needs is not known, so nothing is garbage.
    """
    root = _whole(root, "gc")
    latest = latest_version(root)
    if latest is None:
        raise UsageError(f"expected a dataset at {root}, found no LATEST in it")
    everything = list_versions(root)
    kept = everything
    if keep_last is not None:
        line = lineage(open_version(f"{root}@{latest}"))
        kept = [version.version for version in islice(line, keep_last)]
    needed = _files_of(root, kept)
    dropped = tuple(name for name in everything if name not in kept)
    of_dropped = _files_of(root, dropped)
    ours = tuple(f"{name}/" for name in _ORDER)
    there = storage.walk(root, hidden=True, may_vanish=True)  # jobs that end remove their notes
    files = [entry for entry in there if entry.path.startswith(ours) and entry.path not in needed]
    last_of = _last_changes(files)
    limit = time.time() - older_than_hours * 3600
    garbage = [
        entry for entry in files if entry.path in of_dropped or (last_of(entry) <= limit and not _is_build_note(entry))
    ]
    files = sorted(garbage, key=lambda e: (_ORDER.index(e.path.partition("/")[0]), e.path))
    uploads = storage.abandoned_uploads(root, older_than_hours=older_than_hours)
    return Garbage(root, dropped, tuple(files), tuple(upload for upload in uploads if upload.path.startswith(ours)))


def _files_of(root: str, versions: Iterable[str]) -> set[str]:
    files = set[str]()
    for name in versions:
        try:
            version = open_version(f"{root}@{name}")
        except UsageError:  # another gc deleted it meanwhile
            continue
        files |= {f"versions/{name}.json", f"manifests/{name}.parquet"}
        files |= {f"shards/{shard.name}" for shard in version.shards}
    return files


def _last_changes(files: Iterable[storage.Entry]) -> Callable[[storage.Entry], float]:
    """When a file was last of use, for all that is known: what a build left is as young as its youngest note, and
    shards, which no version names yet, may be any build's.
    """
    builds = dict[str, float]()
    for entry in files:
        if entry.path.startswith("work/"):
            build = entry.path.split("/")[1]
            builds[build] = max(entry.changed, builds.get(build, 0))
    youngest = max(builds.values(), default=0)

    def last_of(entry: storage.Entry) -> float:
        room, name, *_ = entry.path.split("/")
        return builds[name] if room == "work" else max(entry.changed, youngest if room == "shards" else 0)

    return last_of


def _is_build_note(entry: storage.Entry) -> bool:
    return entry.path.startswith("builds/") and entry.path.endswith(".json")


def collect(garbage: Garbage) -> None:
    """Delete it, but for what a version needs that was published since it was found.

    Raises:
        DatasetError: LATEST names one of its versions by now.
    """
    if latest_version(garbage.root) in garbage.versions:
        raise DatasetError(f"LATEST of {garbage.root} is another version than before; nothing was deleted: try again")
    left, read = set[str](), set[str]()
    for room, entries in groupby(garbage.files, key=lambda entry: entry.path.partition("/")[0]):
        if room != "versions":
            new = [name for name in list_versions(garbage.root) if name not in read]
            left |= _files_of(garbage.root, new)
            read.update(new)
        storage.remove_files(entry.uri for entry in entries if entry.path not in left)
    for upload in garbage.uploads:
        storage.abort_upload(upload)
