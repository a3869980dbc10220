"""Images that look alike, by perceptual hash: within a version, or between training and evaluation.

Hashes of 64 bits that differ in at most d bits agree in at least one of d + 1 bands, so only images that share a band
are compared: no image is missed, and 10^5 images need no 10^10 comparisons.

Of k images that all look alike k - 1 pairs are told, not k^2 / 2: ten thousand frames of one film are no 50 million.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from adaconv.data.ingest import check_hashes
from adaconv.data.manifest import DatasetVersion

_PAIRS_AT_ONCE = 2**22
_COPY_BITS = 4  # between hashes of one picture, scaled or encoded anew

Hashes = NDArray[np.uint64]
Rows = dict[int, list[int]]  # of each hash, in order


@dataclass(frozen=True)
class Pair:
    """Rows `first` and `second` of the hashes given; `distance` is in bits."""

    first: int
    second: int
    distance: int


def similar_pairs(hashes: Hashes, *, distance: int, others: Hashes | None = None) -> list[Pair]:
    """Pairs of at most `distance` differing bits, the nearest first; every image that is near another is in one.

    Within a set they are the shortest links that join all that near pairs join (a minimum spanning forest), so there
    are as many as images that another one of their cluster could stand for. Between two sets each image is paired with
    the nearest of the other.

    Args:
        hashes: (n,) uint64.
        distance: in bits.
        others: (m,) uint64; pairs are then one of each, `second` among these. None looks within `hashes`.
    """
    if others is None:
        pairs = _pairs_within(_rows_of(hashes), distance)
    else:
        pairs = _pairs_between(_rows_of(hashes), _rows_of(others), distance)
    return sorted(pairs, key=lambda pair: (pair.distance, pair.first, pair.second))


def seen_in(version: DatasetVersion, hashes: Hashes) -> dict[int, str]:
    """Which of some pictures a version holds too, or nearly: their places, each to the source of the nearest there.

    Args:
        version: of the dataset.
        hashes: of the pictures, (n,) uint64, by `ingest.perceptual_hash`.

    Raises:
        DatasetError: the version's pictures were hashed by another release.
    """
    check_hashes(version.recipe, of=f"{version.root}@{version.version}")
    table = version.samples(["phash", "source"])
    near = similar_pairs(hashes, distance=_COPY_BITS, others=table["phash"].to_numpy())
    sources: dict[int, str] = {}
    for pair in near:  # the nearest come first
        sources.setdefault(pair.first, table["source"][pair.second].as_py())
    return sources


def _rows_of(hashes: Hashes) -> Rows:
    rows: Rows = {}
    for row, value in enumerate(hashes.tolist()):
        rows.setdefault(value, []).append(row)
    return rows


def _pairs_within(rows: Rows, distance: int) -> Iterator[Pair]:
    for first, *rest in rows.values():
        yield from (Pair(first, row, 0) for row in rest)
    values = np.sort(np.fromiter(rows, np.uint64))
    links: set[tuple[int, int, int]] = set()  # the forest's are among those of the groups' forests
    for places in _groups(values, distance):
        links.update(_forest(_near_any(values[places], distance), distance))
    joined: dict[int, int] = {}
    for bits, one, other in sorted(links):
        a, b = _root(joined, one), _root(joined, other)
        if a != b:
            joined[a] = b
            first, second = sorted((rows[one][0], rows[other][0]))
            yield Pair(first, second, bits)


def _pairs_between(rows: Rows, other_rows: Rows, distance: int) -> Iterator[Pair]:
    values = np.sort(np.fromiter(rows.keys() | other_rows.keys(), np.uint64))
    in_first, in_second = (np.isin(values, np.fromiter(some, np.uint64)) for some in (rows, other_rows))
    nearest: tuple[dict[int, tuple[int, int]], ...] = ({}, {})  # of the first's values, and of the second's
    for places in _groups(values, distance, least=1):
        first, second = values[places[in_first[places]]], values[places[in_second[places]]]
        for ones, theirs, known in ((first, second, nearest[0]), (second, first, nearest[1])):
            for one, *found in _nearest(ones, theirs, distance):
                known[one] = min(known.get(one, (65, 0)), (found[0], found[1]))
    pairs = {Pair(row, other_rows[other][0], bits) for one, (bits, other) in nearest[0].items() for row in rows[one]}
    pairs |= {Pair(rows[other][0], row, bits) for one, (bits, other) in nearest[1].items() for row in other_rows[one]}
    yield from pairs


def _groups(values: Hashes, distance: int, *, least: int = 2) -> Iterator[NDArray[np.intp]]:
    """Places of values, in order, that share a band, at least so many."""
    for band in _bands(distance + 1):
        keys = values & np.uint64(band)
        order = np.argsort(keys, kind="stable")
        edges = np.flatnonzero(np.diff(keys[order])) + 1
        yield from (group for group in np.split(order, edges) if len(group) >= least)


def _bands(count: int) -> list[int]:
    """Masks that cut 64 bits into bands of nearly equal width."""
    edges = [64 * band // count for band in range(count + 1)]
    return [((1 << (end - start)) - 1) << start for start, end in pairwise(edges)]


def _near_any(values: Hashes, distance: int) -> Hashes:
    """Those that are near another: few of most groups, so that a forest is grown of few."""
    counts = [np.count_nonzero(bits <= distance, axis=1) for _, bits in _bits_between(values, values)]
    return values[np.concatenate(counts) > 1]  # each is near itself


def _nearest(values: Hashes, others: Hashes, distance: int) -> Iterator[tuple[int, int, int]]:
    """(value, bits, other) of each value that is near another."""
    for some, bits in _bits_between(values, others) if len(others) else ():
        places = bits.argmin(axis=1)
        least = bits[np.arange(len(some)), places]
        near = least <= distance
        yield from zip(some[near].tolist(), least[near].tolist(), others[places[near]].tolist(), strict=True)


def _bits_between(values: Hashes, others: Hashes) -> Iterator[tuple[Hashes, NDArray[np.uint8]]]:
    """Some of the values at a time, and the bits (some, others) in which they differ."""
    step = max(1, _PAIRS_AT_ONCE // max(1, len(others)))
    for start in range(0, len(values), step):
        some = values[start : start + step]
        yield some, np.bitwise_count(some[:, None] ^ others[None, :])


def _forest(values: Hashes, distance: int) -> Iterator[tuple[int, int, int]]:
    """(bits, one, other) of the shortest links that join all that near pairs join, by Prim's rule."""
    if not len(values):
        return
    here, left = values[0], values[1:].copy()
    bits, link = np.full(len(left), 65, np.uint8), left.copy()  # to the nearest that was taken
    while len(left):
        to_here = np.bitwise_count(left ^ here)
        closer = to_here < bits
        bits[closer], link[closer] = to_here[closer], here
        place = int(bits.argmin())
        here = left[place]
        if bits[place] <= distance:
            one, other = sorted((int(link[place]), int(here)))
            yield int(bits[place]), one, other
        for some in (left, bits, link):
            some[place] = some[-1]
        left, bits, link = left[:-1], bits[:-1], link[:-1]


def _root(joined: dict[int, int], value: int) -> int:
    while value in joined:
        joined[value] = joined.get(joined[value], joined[value])
        value = joined[value]
    return value
