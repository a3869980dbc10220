"""pipelines/shard.py: what its plan says, which needs no cluster."""

import pytest

from pipelines import shard


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
