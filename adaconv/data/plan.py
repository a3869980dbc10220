"""Which image goes into which shard: a pure function of what was found."""

from collections.abc import Iterable
from dataclasses import dataclass

from adaconv.config.shard import RecipeConfig
from adaconv.data.ingest import stored_size

_TAR_OVERHEAD_BYTES = 2560  # two headers, the json and the padding of both members
_JPEG_BYTES_PER_PIXEL = 0.45  # of quality 95 without chroma subsampling, about


@dataclass(frozen=True)
class Candidate:
    """An image whose header was read.

    `uri` is where it is read from, `source` its path below the folder that was given, which stays when that moves.
    `bytes` of the file; width and height as stored there.
    """

    key: str
    uri: str
    source: str
    label: str
    sha256: str
    bytes: int
    width: int
    height: int


@dataclass(frozen=True)
class ShardPlan:
    index: int
    candidates: tuple[Candidate, ...]


def plan_shards(
    candidates: Iterable[Candidate], recipe: RecipeConfig
) -> tuple[list[ShardPlan], list[tuple[Candidate, Candidate]]]:
    """Cut the images, in the order of their keys, into shards of about the target size.

    Keys are hashes, so their order is a shuffle that depends on nothing else. Of images with the same bytes the first
    by source stays.

    Returns:
        the shards, and the duplicates as (left out, stays).
    """
    ordered = sorted(candidates, key=lambda c: (c.key, c.source))
    unique: list[Candidate] = []
    duplicates = []
    for candidate in ordered:
        if unique and unique[-1].key == candidate.key:
            duplicates.append((candidate, unique[-1]))
        else:
            unique.append(candidate)
    shards: list[list[Candidate]] = [[]]
    filled = 0
    for candidate in unique:
        size = expected_bytes(candidate, recipe)
        if shards[-1] and filled + size > recipe.target_mb * 1e6:
            shards.append([])
            filled = 0
        shards[-1].append(candidate)
        filled += size
    return [ShardPlan(i, tuple(members)) for i, members in enumerate(shards) if members], duplicates


def expected_bytes(candidate: Candidate, recipe: RecipeConfig) -> int:
    """Bytes that an image is expected to take in a tar; exact where it keeps its own."""
    size = stored_size(candidate.width, candidate.height, recipe)
    if size == (candidate.width, candidate.height):
        return candidate.bytes + _TAR_OVERHEAD_BYTES
    return int(size[0] * size[1] * _JPEG_BYTES_PER_PIXEL) + _TAR_OVERHEAD_BYTES
