"""The global order is a pure function of (dataset, seed, step)."""

import numpy as np
import pytest

from adaconv.data.order import StreamOrder, batch_of_step, rank_slice, stable_permutation
from adaconv.errors import UsageError


def order(rows=(10, 7, 12, 9), seed=3, name="content", batch=4, **more):
    return StreamOrder(list(rows), seed, name, batch, **more)


def stream(layout, steps):
    return np.concatenate([layout.batch(step) for step in range(steps)])


def test_every_sample_is_read_once_per_epoch():
    """38 samples: any window of 38 that starts at an epoch holds each once."""
    samples = stream(order(), 19)  # 76 = two epochs
    assert sorted(samples[:38]) == list(range(38))
    assert sorted(samples[38:]) == list(range(38))
    assert list(samples[:38]) != list(samples[38:])


def test_steps_go_on_with_the_batches_after_those_that_are_skipped():
    assert [batch_of_step(step, [(2, 4), (5, 6)]) for step in range(5)] == [0, 1, 4, 6, 7]
    assert batch_of_step(10**6, []) == 10**6


def test_any_step_is_found_without_the_ones_before():
    """Asking for step 1000 first, or after all others, gives the same batch: resuming is O(1)."""
    walked = order()
    for step in range(1000):
        walked.batch(step)
    assert np.array_equal(walked.batch(1000), order().batch(1000))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 8])
def test_ranks_together_read_the_global_batch_whatever_their_number(num_ranks):
    batch = order(batch=8).batch(5)
    parts = [batch[rank_slice(8, rank, num_ranks)] for rank in range(num_ranks)]
    assert np.array_equal(np.concatenate(parts), batch)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_seed_stream_and_epoch_change_the_order():
    first = stream(order(), 9)
    assert not np.array_equal(first, stream(order(seed=4), 9))
    assert not np.array_equal(first, stream(order(name="style"), 9))


def test_the_order_is_the_same_in_every_release():
    """Frozen: a checkpoint of an older release goes on with the samples that it would have seen."""
    assert stable_permutation(8, 0, "content", 0).tolist() == FROZEN_PERMUTATION
    assert order().batch(0).tolist() == FROZEN_BATCH


FROZEN_PERMUTATION = [4, 7, 3, 2, 1, 6, 5, 0]
FROZEN_BATCH = [28, 21, 24, 34]


def test_a_block_of_shards_is_used_up_before_the_next_is_opened():
    """With block_shards=1 each shard's samples come together, so one cached shard serves a reader."""
    layout = order(rows=(6,) * 5, batch=1, block_shards=1)
    shards = stream(layout, 30) // 6
    assert len(set(np.flatnonzero(np.diff(shards)) + 1)) == 4


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_that_divide_the_partitions_share_no_shard_in_an_epoch(num_ranks):
    rows, batch = (8,) * 8, 8
    layout = order(rows=rows, batch=batch, partitions=4)
    shards_of_rank = [set() for _ in range(num_ranks)]
    for step in range(sum(rows) // batch):
        for rank in range(num_ranks):
            shards_of_rank[rank] |= set((layout.batch(step)[rank_slice(batch, rank, num_ranks)] // 8).tolist())
    assert sum(map(len, shards_of_rank)) == 8
    assert set().union(*shards_of_rank) == set(range(8))


def test_no_sample_comes_twice_in_an_epoch_of_uneven_partitions():
    layout = order(rows=(5, 3, 4, 6, 2), batch=4, partitions=2)
    epoch = stream(layout, (3 + 2) // 2)  # an epoch is cut to what two of the five shards can give at least
    assert len(set(epoch.tolist())) == len(epoch)


def test_a_dataset_smaller_than_a_batch_is_read_round_and_round():
    layout = order(rows=(3,), batch=8)
    assert sorted(stream(layout, 3)) == sorted(list(range(3)) * 8)


def test_what_cannot_be_laid_out_is_refused():
    with pytest.raises(UsageError, match="holds no samples"):
        order(rows=())
    with pytest.raises(UsageError, match=r"data\.partitions \(3\) must divide"):
        order(partitions=3)
    with pytest.raises(UsageError, match="exceeds the 2 shards"):
        order(rows=(4, 4), partitions=4)
    with pytest.raises(
        UsageError,
        match=r"hold 3 % of its samples.* have 30 to 1000 .* 29 times as often as the mean; 4 partitions would do",
    ):
        order(rows=(1000,) * 7 + (30,), batch=8, partitions=8)
