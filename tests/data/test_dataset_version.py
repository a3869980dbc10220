"""Plan, shards and manifest: the dataset version from raw files to closed books."""

import io
import json
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from adaconv import storage
from adaconv.config.shard import RecipeConfig
from adaconv.data.manifest import MANIFEST, Shard, close_books, open_version
from adaconv.data.plan import Candidate, expected_bytes, plan_shards
from adaconv.data.shard_writer import row_of
from adaconv.data.sources import list_images
from adaconv.errors import DatasetError, UsageError
from tests.helpers import RECIPE, build_version


def candidate(number: int, *, size: int = 1000, key: str | None = None) -> Candidate:
    source = f"{number}.jpg"
    return Candidate(key or f"{number * 7919 % 1000:032x}", source, source, "", f"{number:064x}", size, 64, 64)


@settings(deadline=None, max_examples=50)
@given(st.permutations(range(30)), st.floats(0.004, 0.1))
def test_a_plan_does_not_depend_on_the_order_of_the_listing(order, target_mb):
    recipe = RecipeConfig(target_mb=target_mb, short_side=64)
    plans, _ = plan_shards([candidate(n) for n in order], recipe)
    assert plans == plan_shards([candidate(n) for n in range(30)], recipe)[0]
    members = [c.source for plan in plans for c in plan.candidates]
    assert sorted(members) == sorted(f"{n}.jpg" for n in range(30))
    for plan in plans:
        assert len(plan.candidates) == 1 or sum(expected_bytes(c, recipe) for c in plan.candidates) <= target_mb * 1e6


def test_of_equal_bytes_the_first_source_stays():
    same = [candidate(n, key="ab" * 16) for n in (3, 1, 2)]
    plans, duplicates = plan_shards(same, RecipeConfig())
    assert [c.source for c in plans[0].candidates] == ["1.jpg"]
    assert [(left.source, stays.source) for left, stays in duplicates] == [("2.jpg", "1.jpg"), ("3.jpg", "1.jpg")]


def test_nothing_found_makes_no_shards():
    assert plan_shards([], RecipeConfig()) == ([], [])


def test_the_same_images_give_the_same_bytes(photos, tmp_path):
    one, again = (build_version(photos, str(tmp_path / name)) for name in ("one", "again"))
    assert one.root_hash == again.root_hash
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert len([f for f in files if f.suffix == ".tar"]) == len(one.shards) > 2
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_another_recipe_is_another_version(photos, tmp_path):
    one = build_version(photos, str(tmp_path))
    other = build_version(photos, str(tmp_path), RECIPE.model_copy(update={"jpeg_quality": 90, "short_side": 64}))
    assert one.root_hash != other.root_hash
    assert open_version(str(tmp_path)).version == other.version
    assert open_version(f"{tmp_path}@{one.version}").root_hash == one.root_hash


def test_every_sample_lies_where_the_manifest_says(content_version):
    table = content_version.samples()
    assert len(table) == content_version.books["kept"] + content_version.books["repaired"] == 24
    for row in table.to_pylist():
        data = storage.read_range(content_version.shard_uri(row["shard"]), row["offset"], row["size"])
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == (row["width"], row["height"])


def test_tars_are_plain_webdataset(content_version):
    import webdataset

    found = []
    for shard in content_version.shards:
        for sample in webdataset.WebDataset(content_version.shard_uri(shard.name), shardshuffle=False):
            assert sample["jpg"][:2] == b"\xff\xd8"
            assert set(json.loads(sample["json"])) == {"source", "source_sha256", "label", "source_size"}
            found.append(sample["__key__"])
    assert sorted(found) == sorted(content_version.samples()["key"].to_pylist())


def test_tars_name_no_machine(content_version):
    for shard in content_version.shards:
        with tarfile.open(content_version.shard_uri(shard.name)) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")


def test_broken_files_end_in_the_books(photos, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(photos, folder)
    (folder / "zz_cut.jpg").write_bytes(next(photos.iterdir()).read_bytes()[:3000])
    shutil.copy(next(photos.iterdir()), folder / "zz_again.jpg")
    version = build_version(folder, str(tmp_path / "data"))
    assert version.books["found"] == 26
    assert version.books["quarantined"] == 1
    assert version.books["duplicate"] == 1
    assert version.books["reasons"]["truncated"] == 1


def test_books_that_do_not_balance_are_refused():
    rows = pa.Table.from_pylist([row_of(candidate(0), "kept"), row_of(candidate(1), "kept")], schema=MANIFEST)
    with pytest.raises(DatasetError, match="2 samples were kept, 1 lie in shards"):
        close_books(rows, [Shard("a.tar", rows=1, bytes=1, sha256="")])
    lost = pa.Table.from_pylist([row_of(candidate(0), "forgotten")], schema=MANIFEST)
    with pytest.raises(DatasetError, match="do not balance"):
        close_books(lost, [])


def test_what_is_not_there_is_said(tmp_path, content_version):
    with pytest.raises(UsageError, match=r"found no LATEST in it; pipelines/shard\.py makes one"):
        open_version(str(tmp_path))
    with pytest.raises(UsageError, match=f"has no version abc; it has {content_version.version}"):
        open_version(f"{content_version.root}@abc")


def test_listing_is_sorted_labelled_and_skips_what_is_hidden(tmp_path):
    for name in ("b/z.JPG", "b/a.png", "a/é 写.jpeg", "c.tif", ".hidden.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = list_images((str(tmp_path),))
    assert [f.source for f in found] == ["c.tif", "a/é 写.jpeg", "b/a.png", "b/z.JPG"]
    assert [f.label for f in found] == ["", "a", "b", "b"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ("nothing", "found nothing there"),
        ("file", "found a file"),
        ("empty", "an empty folder"),
        ("texts", "found 1 other files"),
    ],
)
def test_a_source_without_images_is_answered(tmp_path, make, message):
    target = tmp_path / "source"
    if make == "file":
        target.write_text("")
    elif make in ("empty", "texts"):
        target.mkdir()
        if make == "texts":
            (target / "a.txt").write_text("")
    with pytest.raises(UsageError, match=message):
        list_images((str(target),), flag="--content")


def test_keys_spread_labels_over_shards():
    """Membership follows hashes, so no shard is one folder's: a shard alone is already shuffled."""
    plans, _ = plan_shards([candidate(n) for n in range(100)], RecipeConfig(target_mb=0.08, short_side=64))
    first = [int(c.source.removesuffix(".jpg")) for c in plans[0].candidates]
    assert len(plans) > 3
    assert np.std(first) > 15
