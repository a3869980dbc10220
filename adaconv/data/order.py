"""Which samples make the global batch of a step, and whose they are: pure functions of (dataset, seed, step).

Two unpaired endless streams, content and style, are each laid out by a `StreamOrder`. Nothing here depends on the
number of ranks or loader workers, so a run resumes from one integer, exactly, on any number of ranks.

    epoch e      shards permuted by (seed, stream, e), then cut into blocks of `block_shards` neighbours;
                 the samples of a block are permuted. A reader works through a block at a time, so a bounded
                 cache of whole shards serves it.
    partition p  takes every P-th permuted shard. A batch draws the same number of samples from each
                 partition, side by side, so ranks whose count divides P share no shard within an epoch.

Random numbers are raw Philox words sorted stably: the same on every numpy release, as a `Generator` is not.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from adaconv.errors import UsageError

_LEAST_SHARE = 0.5  # of the samples, in an epoch of partitions


def stable_seed(*parts: object) -> int:
    """128 bits that depend on the parts alone: not on the process, the platform or Python's hash seed."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:16], "little")


def stable_permutation(count: int, *seed: object) -> NDArray[np.int64]:
    """A permutation of range(count): (count,) int64."""
    words = np.random.Philox(key=stable_seed(*seed)).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64)


def batch_of_step(step: int, skipped: Sequence[tuple[int, int]]) -> int:
    """Which batch of the order a step takes, where ranges of them (first, end), sorted and apart, are left out."""
    for first, end in skipped:
        if step >= first:
            step += end - first
    return step


@dataclass
class StreamOrder:
    """The endless order of one dataset's samples.

    Args:
        shard_rows: rows of each shard, in the manifest's order; sample i of shard s is row sum(shard_rows[:s]) + i.
        seed: of the run.
        name: of the stream, `content` or `style`; two streams over one dataset differ by it.
        batch_size: samples of a global batch.
        partitions: P, divides `batch_size`, at most the number of shards. With P > 1 the partitions of an epoch are cut
            to equal length: the longest ones leave out, in this epoch, what they have more than the shortest. Small
            shards are in every epoch whole, so an epoch must hold half of the samples at least.
        block_shards: shards whose samples are mixed with one another; larger shuffles better and caches more.

    Raises:
        UsageError: no samples, or partitions that the batch, the shards' number or their sizes do not admit.
    """

    shard_rows: Sequence[int]
    seed: int
    name: str
    batch_size: int
    partitions: int = 1
    block_shards: int = 8
    _epochs: dict[int, NDArray[np.int64]] = field(default_factory=dict, init=False, repr=False)
    _epoch_length: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not sum(self.shard_rows):
            raise UsageError(f"the {self.name} dataset holds no samples; shard some images first")
        if self.batch_size % self.partitions:
            raise UsageError(
                f"data.partitions ({self.partitions}) must divide train.global_batch_size ({self.batch_size})"
            )
        if self.partitions > len(self.shard_rows):
            raise UsageError(
                f"data.partitions ({self.partitions}) exceeds the {len(self.shard_rows)} shards of the {self.name} "
                "dataset; lower it, or shard with a smaller --shard.target-mb"
            )
        if self._share(self.partitions) < _LEAST_SHARE:
            fits = [p for p in range(1, self.partitions) if self.batch_size % p == 0 and self._share(p) >= _LEAST_SHARE]
            raise UsageError(
                f"data.partitions ({self.partitions}): an epoch of the {self.name} dataset would hold "
                f"{100 * self._share(self.partitions):.0f} % of its samples, for its shards have "
                f"{min(self.shard_rows)} to {max(self.shard_rows)} and the smallest is in every epoch: it would be "
                f"seen {1 / self._share(self.partitions):.0f} times as often as the mean; {fits[-1]} partitions "
                "would do"
            )
        self._epoch_length = self._rows_of_a_part(self.partitions)

    def _share(self, partitions: int) -> float:
        """Of the samples that an epoch holds."""
        return partitions * self._rows_of_a_part(partitions) / sum(self.shard_rows)

    def _rows_of_a_part(self, partitions: int) -> int:
        """Without partitions an epoch is the dataset; with them its length may differ by epoch, so it is fixed to what
        every epoch can give: the fewest rows that any P-th part of the shards can have.
        """
        fewest = len(self.shard_rows) // partitions
        return max(1, sum(sorted(self.shard_rows)[:fewest]))

    def batch(self, step: int) -> NDArray[np.int64]:
        """Rows of the global batch of a step: (batch_size,) int64. Steps count from 0."""
        each = self.batch_size // self.partitions
        columns, position, end = [], step * each, (step + 1) * each
        while position < end:  # mostly once: a batch lies in one epoch, or in two
            epoch, offset = divmod(position, self._epoch_length)
            columns.append(self._epoch(epoch)[:, offset : offset + end - position])
            position += columns[-1].shape[1]
        return np.concatenate(columns, axis=1).reshape(-1)  # (partitions, each) -> (batch_size,)

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        """The order of an epoch: (partitions, epoch length) int64."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:  # a batch spans two epochs at most
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = self._shuffle(epoch)
        return self._epochs[epoch]

    def _shuffle(self, epoch: int) -> NDArray[np.int64]:
        starts = np.concatenate([[0], np.cumsum(self.shard_rows)])
        shards = stable_permutation(len(self.shard_rows), self.seed, self.name, epoch, "shards")
        partitions = []
        for part in range(self.partitions):
            mine = shards[part :: self.partitions]
            blocks = []
            for first in range(0, len(mine), self.block_shards):
                block = mine[first : first + self.block_shards]
                rows = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in block])
                blocks.append(rows[stable_permutation(len(rows), self.seed, self.name, epoch, part, first)])
            partitions.append(np.concatenate(blocks)[: self._epoch_length])
        return np.stack(partitions)


def rank_slice(batch_size: int, rank: int, num_ranks: int) -> slice:
    """The part of a global batch that a rank works on; sizes differ by one at most where ranks do not divide it."""
    return slice(batch_size * rank // num_ranks, batch_size * (rank + 1) // num_ranks)
