"""Images that look alike, by perceptual hash: within a version, or between training and evaluation.

Hashes of 64 bits that differ in at most d bits agree in at least one of d + 1 bands, so only images that share a band
are compared: no pair is missed, and 10^5 images need no 10^10 comparisons.
"""

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
    """Every pair of at most `distance` differing bits, the nearest first.

    Args:
        hashes: (n,) uint64.
        distance: in bits.
        others: (m,) uint64; pairs are then one of each, `second` among these. None looks within `hashes`.
    """
    n = len(hashes)
    together = hashes if others is None else np.concatenate([hashes, others])
    found: dict[tuple[int, int], int] = {}
    for band in _bands(distance + 1):
        keys = together & np.uint64(band)
        order = np.argsort(keys, kind="stable")
        edges = np.flatnonzero(np.diff(keys[order])) + 1
        for group in np.split(order, edges):
            if len(group) > 1:
                _compare(np.sort(group), together, n if others is not None else None, distance, found)
    pairs = [Pair(first, second - (n if others is not None else 0), bits) for (first, second), bits in found.items()]
    return sorted(pairs, key=lambda pair: (pair.distance, pair.first, pair.second))


def _bands(count: int) -> list[int]:
    """Masks that cut 64 bits into bands of nearly equal width."""
    edges = [64 * band // count for band in range(count + 1)]
    return [((1 << (end - start)) - 1) << start for start, end in pairwise(edges)]


def _compare(
    group: NDArray[np.int64],
    hashes: NDArray[np.uint64],
    border: int | None,
    distance: int,
    found: dict[tuple[int, int], int],
) -> None:
    """Enter the near pairs of images that share a band; with a border, only those across it."""
    left, right = (group, group) if border is None else (group[group < border], group[group >= border])
    step = max(1, _PAIRS_AT_ONCE // max(1, len(right)))
    for start in range(0, len(left), step):
        some = left[start : start + step]
        bits = np.bitwise_count(hashes[some][:, None] ^ hashes[right][None, :])  # (some, right)
        for row, column in zip(*np.nonzero(bits <= distance), strict=True):
            first, second = int(some[row]), int(right[column])
            if first < second:
                found[first, second] = int(bits[row, column])
