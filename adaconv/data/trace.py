"""Which versions of a dataset hold some images, and what these images' bytes are."""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from adaconv import storage
from adaconv.data.manifest import IN_SHARDS, DatasetVersion, Row, list_versions, open_version
from adaconv.data.selection import Criterion, keys_to_remove
from adaconv.errors import UsageError


@dataclass(frozen=True)
class Holding:
    """A version that holds some of the images. `shards`: that they lie in."""

    version: DatasetVersion
    images: int
    shards: tuple[str, ...]


@dataclass(frozen=True)
class Traced:
    """`keys` of the images that were found. `sha256`: of their sources, and of what became of them in shards."""

    keys: frozenset[str]
    sha256: frozenset[str]
    holdings: tuple[Holding, ...]


def trace(roots: Sequence[str], criteria: Sequence[Criterion]) -> Traced:
    """Look for images in all versions of some datasets.

    Raises:
        UsageError: a criterion names no image of any of them.
        DatasetError: a version cannot be read.
    """
    keys, digests, holdings = set[str](), set[str](), list[Holding]()
    unfound = dict.fromkeys(criteria)
    for version in [open_version(f"{root}@{name}") for root in roots for name in sorted(list_versions(root))]:
        mine = set[str]()
        for criterion in criteria:
            with contextlib.suppress(UsageError):  # of this version; another one may have it
                mine |= keys_to_remove(_none_gone(version), [criterion]).keys()
                unfound.pop(criterion, None)
        held = Counter[str]()
        for row in version.rows():
            if row["key"] not in mine:
                continue
            digests.add(row["source_sha256"])
            if row["state"] not in IN_SHARDS:
                continue
            held[row["shard"]] += 1
            if row["key"] not in keys:  # in another version it has the same bytes, of the same recipe
                shard = storage.join(version.root, "shards", row["shard"])
                digests.add(hashlib.sha256(storage.read_range(shard, row["offset"], row["size"])).hexdigest())
        keys |= mine
        if held:
            holdings.append(Holding(version, held.total(), tuple(held)))
    if unfound:
        told = ", ".join(f"--{one.field.replace('_', '-')} {one.value}" for one in unfound)
        raise UsageError(f"{told}: no version of {', '.join(roots)} has such an image")
    return Traced(frozenset(keys), frozenset(digests), tuple(holdings))


def _none_gone(version: DatasetVersion) -> Iterator[Row]:
    """What was removed counts as well: outputs and models of it are there all the same."""
    return ({**row, "state": "kept"} if row["state"] == "excluded" else row for row in version.rows())
