"""Images that look alike, by perceptual hash: within a version, or between training and evaluation.

Hashes of 64 bits that differ in at most d bits agree in at least one of d + 1 bands, so only images that share a band
are compared: no pair is missed, and 10^5 images need no 10^10 comparisons.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_PAIRS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Pair:
    """Rows `first` and `second` of the hashes given; `distance` is in bits."""

    first: int
    second: int
    distance: int


def similar_pairs(hashes: NDArray[np.uint64], *, distance: int, others: NDArray[np.uint64] | None = None) -> list[Pair]:
    """Pairs of at most `distance` differing bits, the nearest first; every image that is near another is in one.

    Images of one hash stand for one another, so that thousands of black ones are not millions of pairs: the first of
    them is paired with each of the rest, and alone with images of near hashes. Between two sets each is paired with
    the first of a near hash in the other.

    Args:
        hashes: (n,) uint64.
        distance: in bits.
        others: (m,) uint64; pairs are then one of each, `second` among these. None looks within `hashes`.
    """
    rows, second_rows = _rows_of(hashes), _rows_of(hashes if others is None else others)
    values = np.fromiter(rows.keys() | second_rows.keys(), np.uint64)
    pairs = []
    for one, other, bits in [*_near(values, distance), *((int(value), int(value), 0) for value in values)]:
        if others is None:
            if one == other:
                first, *rest = rows[one]
                pairs += [Pair(first, row, 0) for row in rest]
            else:
                first, second = sorted((rows[one][0], rows[other][0]))
                pairs.append(Pair(first, second, bits))
        else:
            for a, b in {(one, other), (other, one)}:
                if a in rows and b in second_rows:
                    pairs += [Pair(row, second_rows[b][0], bits) for row in rows[a]]
                    pairs += [Pair(rows[a][0], row, bits) for row in second_rows[b][1:]]
    return sorted(pairs, key=lambda pair: (pair.distance, pair.first, pair.second))


def _rows_of(hashes: NDArray[np.uint64]) -> dict[int, list[int]]:
    """Hash -> its rows, in order."""
    rows: dict[int, list[int]] = {}
    for row, value in enumerate(hashes.tolist()):
        rows.setdefault(value, []).append(row)
    return rows


def _near(values: NDArray[np.uint64], distance: int) -> Iterator[tuple[int, int, int]]:
    """Pairs of different values, once each, and the bits between them."""
    values = np.sort(values)
    found: dict[tuple[int, int], int] = {}
    for band in _bands(distance + 1):
        keys = values & np.uint64(band)
        order = np.argsort(keys, kind="stable")
        edges = np.flatnonzero(np.diff(keys[order])) + 1
        for group in np.split(order, edges):
            if len(group) > 1:
                _compare(values[np.sort(group)], distance, found)
    return ((one, other, bits) for (one, other), bits in found.items())


def _bands(count: int) -> list[int]:
    """Masks that cut 64 bits into bands of nearly equal width."""
    edges = [64 * band // count for band in range(count + 1)]
    return [((1 << (end - start)) - 1) << start for start, end in pairwise(edges)]


def _compare(group: NDArray[np.uint64], distance: int, found: dict[tuple[int, int], int]) -> None:
    """Enter the near pairs of values, in order, that share a band."""
    step = max(1, _PAIRS_AT_ONCE // len(group))
    for start in range(0, len(group), step):
        some = group[start : start + step]
        bits = np.bitwise_count(some[:, None] ^ group[None, :])  # (some, group)
        for row, column in zip(*np.nonzero(bits <= distance), strict=True):
            if start + row < column:
                found[int(some[row]), int(group[column])] = int(bits[row, column])
