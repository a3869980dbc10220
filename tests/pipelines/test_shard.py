"""pipelines/shard.py: what its plan says, which needs no cluster."""

import re
from functools import partial

import pytest

from adaconv.data.builds import spill_listing
from adaconv.data.forecast import forecast
from adaconv.data.plan import plan_shards
from adaconv.data.sources import iter_images
from pipelines import shard
from tests.helpers import RECIPE, look_at

SMALL = {"short_side": 48, "target_mb": 0.02}  # where the sizes of the files would tell twice as much


def planned(capsys, source, *flags) -> str:
    flags = ("--source", source, "--output", "/nowhere", "--shard.min-side", 32, *flags, "--dry-run")
    assert shard.main([str(flag) for flag in flags]) == 0
    return capsys.readouterr().out.partition("# plan")[2]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), " 24 images, "),
        (("--subset.limit", 5), " 5 of 24 images, "),
        (("--subset.per-label", 100, "--subset.seed", 3), " 24 of 24 images, "),
    ],
)
def test_a_plan_tells_how_many_images_are_taken(capsys, photos, flags, told):
    assert told in planned(capsys, photos, *flags).replace("\n", " ")


@pytest.mark.parametrize("recipe", [{}, {"target_mb": 1e-6}, {"target_mb": 9}, {"min_side": 999}, SMALL])
def test_a_forecast_is_what_comes_out(photos, tmp_path, recipe):
    """Of so few images each is looked at: what is left to guess is how they fill shards."""
    recipe = RECIPE.model_copy(update=recipe)
    coming = forecast(spill_listing(iter_images((str(photos),)), tmp_path), recipe)
    found = look_at(iter_images((str(photos),))) if recipe.min_side < 999 else []
    made = len(list(plan_shards(found, recipe, duplicate=partial(pytest.fail))))
    assert coming.looked_at == 24
    assert abs(coming.shards - made) <= 1


def test_a_plan_warns_of_fewer_shards_than_nodes_and_its_advice_mends_it(capsys, photos):
    told = planned(capsys, photos, "--shard.target-mb", 0.2)
    assert "warning" not in told
    shards = int(re.search(r"(\d+) shards serve up to \1 nodes", told)[1])
    assert "warning" not in planned(capsys, photos, "--shard.target-mb", 0.2, "--for-nodes", shards)
    told = planned(capsys, photos, "--shard.target-mb", 0.2, "--for-nodes", 3 * shards)
    target = re.search(rf"are too few for {3 * shards} nodes: .* --shard.target-mb (\S+) makes enough", told)[1]
    assert "warning" not in planned(capsys, photos, "--shard.target-mb", target, "--for-nodes", 3 * shards)
    assert "would all be refused" in planned(capsys, photos, "--shard.min-side", 999)
