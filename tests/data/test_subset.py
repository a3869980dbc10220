"""Subsets of a listing: the same images whatever its order, in memory that does not grow with it."""

import random
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaconv.config.shard import SubsetConfig
from adaconv.data.sources import Found
from adaconv.data.subset import Subset, rank_of
from adaconv.errors import UsageError

FOUND = [Found(f"/data/{n % 3}/{n}.jpg", f"{n % 3}/{n}.jpg", n, str(n)) for n in range(60)]


def taken(tmp_path_factory, found, **config):
    subset = Subset(SubsetConfig(**config), tmp_path_factory.mktemp("subset"))
    return {one.source for one in subset.of(found)}


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(60)), st.sampled_from([{"limit": 7}, {"fraction": 0.4}, {"per_label": 3, "limit": 8}]))
def test_the_order_of_the_listing_and_where_it_lies_change_nothing(tmp_path_factory, order, config):
    elsewhere = [FOUND[n]._replace(uri=f"s3://b/{n}", stamp="other") for n in order]
    assert taken(tmp_path_factory, elsewhere, **config) == taken(tmp_path_factory, FOUND, **config)


def test_a_path_that_is_there_twice_is_taken_alike_whatever_the_order(tmp_path):
    twice = [*FOUND, *(one._replace(uri=f"/other/{one.source}") for one in FOUND)]
    subsets = [
        [one.uri for one in Subset(SubsetConfig(limit=7), tmp_path).of(listing)] for listing in (twice, twice[::-1])
    ]
    assert subsets[0] == subsets[1]
    assert len(set(subsets[0])) == 7


def test_a_smaller_subset_is_part_of_a_larger_one(tmp_path_factory):
    for name, sizes in (("limit", (1, 5, 20)), ("fraction", (0.1, 0.5, 0.9)), ("per_label", (1, 4, 15))):
        small, middle, large = (taken(tmp_path_factory, FOUND, **{name: size}) for size in sizes)
        assert small < middle < large < {one.source for one in FOUND}


def test_counts_are_what_was_asked_for(tmp_path_factory):
    assert len(taken(tmp_path_factory, FOUND, limit=7)) == 7
    assert taken(tmp_path_factory, FOUND, limit=100) == taken(tmp_path_factory, FOUND) == {one.source for one in FOUND}
    by_label = Counter(source[0] for source in taken(tmp_path_factory, [*FOUND[:4], *FOUND[6::3]], per_label=3))
    assert by_label == {"0": 3, "1": 1, "2": 1}
    assert len(taken(tmp_path_factory, FOUND, per_label=3, limit=8)) == 8
    many = [Found("", f"{n}.jpg") for n in range(10_000)]
    assert 900 < len(taken(tmp_path_factory, many, fraction=0.1)) < 1100
    assert taken(tmp_path_factory, many, fraction=1.0) == {one.source for one in many}


def test_another_seed_takes_others(tmp_path_factory):
    assert taken(tmp_path_factory, FOUND, limit=7) != taken(tmp_path_factory, FOUND, limit=7, seed=1)


def test_ranks_stay_what_they_are():
    """A release that changes them would take other images by the same command."""
    assert rank_of("Impressionism/claude-monet_water-lilies.jpg", 0) == 8534484185959216725


def test_a_recipe_tells_of_a_subset_and_of_how_many(tmp_path):
    subset = Subset(SubsetConfig(limit=7, seed=2), tmp_path)
    assert len(list(subset.of(FOUND))) == 7
    assert subset.recipe() == {"subset": {"limit": 7, "seed": 2, "of": 60}}
    whole = Subset(SubsetConfig(seed=2), tmp_path)
    assert list(whole.of(FOUND)) == FOUND
    assert whole.recipe() == {}


def test_a_fraction_of_nothing_is_answered(tmp_path):
    with pytest.raises(UsageError, match=r"--subset\.fraction 1e-09: takes none of 60 images"):
        list(Subset(SubsetConfig(fraction=1e-9), tmp_path).of(FOUND))


def test_memory_does_not_grow_with_what_is_taken(tmp_path):
    def peak(count):
        found = (Found("", f"{random.Random(n).random()}.jpg") for n in range(count))
        tracemalloc.start()
        subset = Subset(SubsetConfig(limit=count // 2, per_label=count // 2), tmp_path)
        assert sum(1 for _ in subset.of(found)) == count // 2
        (tmp_path / "subset.sqlite").unlink()
        reached = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return reached

    peak(10)
    # Other threads of this process allocate some 50 kB now and then; 9,000 more files held would be over 1 MB.
    assert peak(20_000) < peak(2_000) + 300_000
