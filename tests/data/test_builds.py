"""A finished build is recognised from its listing."""

from pathlib import Path

import pytest

from adaconv import storage
from adaconv.data.builds import note_build, spill_listing, whole_version
from adaconv.data.changes import collect, find_garbage
from adaconv.data.ingest import recipe_of
from adaconv.data.manifest import latest_version, version_uri
from adaconv.data.sources import iter_images
from adaconv.errors import UsageError
from tests.helpers import RECIPE, build_version, child_of


def test_a_build_whose_version_was_deleted_does_not_take_the_place_of_what_came_of_it(photos, tmp_path):
    """Else what was removed would come back by the first command again, after gc had done away with it."""
    root, recipe = str(tmp_path / "data"), recipe_of(RECIPE)
    listing = spill_listing(iter_images((str(photos),)), tmp_path)
    first = build_version(photos, root)
    note_build(root, listing.build(recipe, None), first)
    assert whole_version(root, listing, recipe) == first
    child = child_of(first, 2)
    assert whole_version(root, listing, recipe) == first
    collect(find_garbage(root, keep_last=1, older_than_hours=0))
    with pytest.raises(UsageError, match=rf"gave version {first.version}, .* LATEST is {child.version}") as refused:
        whole_version(root, listing, recipe)
    assert latest_version(root) == child.version
    note = str(refused.value).rpartition("delete ")[2]
    Path(note).unlink()
    assert whole_version(root, listing, recipe) is None  # to be made


def test_what_was_appended_is_appended_again_after_a_rollback_and_gc(photos, tmp_path):
    root, recipe = str(tmp_path / "data"), recipe_of(RECIPE)
    listing = spill_listing(iter_images((str(photos),)), tmp_path)
    first = build_version(photos, root)
    child = child_of(first, 2)
    note_build(root, listing.build(recipe, first.version), child)
    assert whole_version(root, listing, recipe, first.version) == child
    storage.remove(version_uri(root, child.version))
    storage.publish_bytes(f"{root}/LATEST", first.version.encode())
    assert whole_version(root, listing, recipe, first.version) is None
