"""The contract between sharding and everything that reads: a dataset version and its manifest.

ROOT/shards/<16 hex of its sha256>.tar    plain WebDataset: KEY.jpg and KEY.json
ROOT/manifests/<version>.parquet          a row for every image found
ROOT/versions/<version>.json              recipe, shards, books, root hash; written last: it publishes
ROOT/LATEST                               the newest version's name
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from adaconv import storage
from adaconv.errors import DatasetError, UsageError

SCHEMA_NUMBER = 1
State = Literal["kept", "repaired", "quarantined", "duplicate"]

MANIFEST = pa.schema(
    [
        ("key", pa.string()),
        ("state", pa.string()),
        ("reason", pa.string()),
        ("source", pa.string()),
        ("source_sha256", pa.string()),
        ("label", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Shard:
    """`name` is the file's name below shards/."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class DatasetVersion:
    """An immutable set of shards. `books` counts images by state, and by reason within `reasons`."""

    root: str
    version: str
    root_hash: str
    recipe: Mapping[str, Any]
    books: Mapping[str, Any]
    shards: tuple[Shard, ...]

    def samples(self) -> pa.Table:
        """Rows of the images that are in shards, shard by shard as `shards` lists them, in the order of each tar."""
        table = self.manifest()
        table = table.filter(pc.is_in(table["state"], value_set=pa.array(["kept", "repaired"])))
        position = {shard.name: index for index, shard in enumerate(self.shards)}
        order = pa.array([position[name] for name in table["shard"].to_pylist()], pa.int32())
        return table.append_column("_", order).sort_by([("_", "ascending"), ("offset", "ascending")]).drop_columns("_")

    def manifest(self) -> pa.Table:
        """A row for every image found."""
        return pq.read_table(io.BytesIO(storage.read_bytes(manifest_uri(self.root, self.version))))

    def shard_uri(self, name: str) -> str:
        return storage.join(self.root, "shards", name)


def manifest_uri(root: str, version: str) -> str:
    return storage.join(root, "manifests", f"{version}.parquet")


def version_uri(root: str, version: str) -> str:
    return storage.join(root, "versions", f"{version}.json")


def open_version(spec: str) -> DatasetVersion:
    """Open ROOT or ROOT@VERSION; without a version, the one that LATEST names.

    Raises:
        UsageError: there is no dataset there, or not this version.
        DatasetError: the version was written by another release.
    """
    root, _, version = spec.rpartition("@") if "@" in storage.name_of(spec) else (spec, "", "")
    root = storage.absolute(root)
    if not version:
        latest = storage.join(root, "LATEST")
        if not storage.exists(latest):
            raise UsageError(
                f"expected a dataset version at {root}, found no LATEST in it; pipelines/shard.py makes one"
            )
        version = storage.read_bytes(latest).decode().strip()
    if not storage.exists(version_uri(root, version)):
        uris = storage.list_files(storage.join(root, "versions"))
        names = [storage.name_of(uri).removesuffix(".json") for uri in uris]
        raise UsageError(f"{root} has no version {version}; it has {', '.join(names) or 'none'}")
    described = json.loads(storage.read_bytes(version_uri(root, version)))
    if described["schema"] != SCHEMA_NUMBER:
        raise DatasetError(f"{root}@{version}: expected schema {SCHEMA_NUMBER}, found {described['schema']}")
    return DatasetVersion(
        root=root,
        version=version,
        root_hash=described["root_hash"],
        recipe=described["recipe"],
        books=described["books"],
        shards=tuple(Shard(**shard) for shard in described["shards"]),
    )


def publish_version(root: str, *, recipe: Mapping[str, Any], shards: list[Shard], rows: pa.Table) -> DatasetVersion:
    """Close the books and publish: manifest, version, LATEST. The same content gives the same name and bytes.

    Raises:
        DatasetError: the books do not balance: the manifest's rows and the shards' disagree.
    """
    rows = rows.cast(MANIFEST).sort_by([("source", "ascending"), ("source_sha256", "ascending")])
    books = close_books(rows, shards)
    content = {"schema": SCHEMA_NUMBER, "recipe": dict(recipe), "shards": [asdict(s) for s in shards], "books": books}
    root_hash = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    version = root_hash[:16]
    buffer = io.BytesIO()
    pq.write_table(rows, buffer)
    storage.publish_bytes(manifest_uri(root, version), buffer.getvalue())
    text = json.dumps({**content, "root_hash": root_hash}, indent=2, sort_keys=True)
    storage.publish_bytes(version_uri(root, version), text.encode())
    storage.publish_bytes(storage.join(root, "LATEST"), version.encode())
    return open_version(f"{root}@{version}")


def close_books(rows: pa.Table, shards: list[Shard]) -> dict[str, Any]:
    """Counts by state and by reason; every image found has exactly one state, and every sample lies in a shard."""
    states = rows["state"].to_pylist()
    books: dict[str, Any] = {"found": len(states)}
    for state in ("kept", "repaired", "quarantined", "duplicate"):
        books[state] = states.count(state)
    reasons: dict[str, int] = {}
    for reasons_of_row in rows["reason"].to_pylist():
        for reason in filter(None, (reasons_of_row or "").split(",")):
            reasons[reason] = reasons.get(reason, 0) + 1
    books["reasons"] = dict(sorted(reasons.items()))
    in_shards = sum(shard.rows for shard in shards)
    if books["found"] != sum(books[s] for s in ("kept", "repaired", "quarantined", "duplicate")):
        raise DatasetError(f"the books do not balance: {books}")
    if in_shards != books["kept"] + books["repaired"]:
        raise DatasetError(f"{books['kept'] + books['repaired']} samples were kept, {in_shards} lie in shards")
    return books
