"""Which versions of a dataset hold some images, and what these images' bytes are."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from adaconv import storage
from adaconv.data.manifest import IN_SHARDS, DatasetVersion, list_versions, open_version
from adaconv.data.selection import Criterion, Selector
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
        UsageError: there is no dataset, or a criterion names no image of any of them.
        DatasetError: a version cannot be read.
    """
    keys, digests, holdings, read = set[str](), set[str](), list[Holding](), set[tuple[str, str]]()
    selector = Selector(criteria)
    for version in chain.from_iterable(map(_versions, roots)):
        # What was removed counts as well: outputs and models of it are there all the same.
        named = (row for row in version.rows() if row["state"] != "quarantined" and selector.first(row))
        mine = {row["key"] for row in named}
        held = Counter[str]()
        for row in version.rows():
            if row["key"] not in mine:
                continue
            digests.add(row["source_sha256"])
            if row["state"] not in IN_SHARDS:
                continue
            held[row["shard"]] += 1
            if (row["shard"], row["key"]) not in read:  # versions share shards
                read.add((row["shard"], row["key"]))
                image = storage.read_range(version.shard_uri(row["shard"]), row["offset"], row["size"])
                digests.add(hashlib.sha256(image).hexdigest())
        keys |= mine
        if held:
            holdings.append(Holding(version, held.total(), tuple(held)))
    if unused := selector.unused(Criterion.as_flag, criteria):
        raise UsageError(f"in no version of {', '.join(roots)}: {unused}")
    return Traced(frozenset(keys), frozenset(digests), tuple(holdings))


def _versions(root: str) -> Iterator[DatasetVersion]:
    """One at a time: one of 10^5 shards takes 50 MB."""
    names = sorted(list_versions(root))
    if not names:
        raise UsageError(f"--dataset {root}: expected a dataset, found no version in it; pipelines/shard.py makes one")
    yield from (open_version(f"{root}@{name}") for name in names)
