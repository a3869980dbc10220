"""Plan, shards and manifest: the dataset version from raw files to closed books."""

import io
import json
import shutil
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from adaconv import storage
from adaconv.config.shard import RecipeConfig
from adaconv.data import manifest
from adaconv.data.manifest import Books, Shard, manifest_uri, open_version
from adaconv.data.plan import Candidate, Catalog, ShardPlan, expected_bytes, plan_shards, row_of
from adaconv.data.sources import Found, Member, fingerprint, list_images
from adaconv.errors import DatasetError, UsageError
from tests.helpers import RECIPE, build_version


def candidate(number: int, *, size: int = 1000, key: str | None = None) -> Candidate:
    found = Found(f"{number}.jpg", f"{number}.jpg", size)
    return Candidate(key or f"{number * 7919 % 1000:032x}", f"{number:064x}", f"{number:032x}", found, 64, 64)


def planned(candidates, recipe=RecipeConfig()):  # noqa: B008
    """Plans and duplicates of candidates that were found in the order given."""
    with tempfile.TemporaryDirectory() as folder:
        catalog = Catalog(Path(folder) / "catalog.sqlite")
        for one in candidates:
            catalog.add(one)
        duplicates: list[Candidate] = []
        plans = list(plan_shards(catalog.candidates(), recipe, duplicate=duplicates.append))
        catalog.close()
    return plans, duplicates


@settings(deadline=None, max_examples=50)
@given(st.permutations(range(30)), st.floats(0.004, 0.1))
def test_a_plan_does_not_depend_on_the_order_of_the_listing(order, target_mb):
    recipe = RecipeConfig(target_mb=target_mb, short_side=64)
    plans, _ = planned([candidate(n) for n in order], recipe)
    assert plans == planned([candidate(n) for n in range(30)], recipe)[0]
    members = [c.source for plan in plans for c in plan.candidates]
    assert sorted(members) == sorted(f"{n}.jpg" for n in range(30))
    for plan in plans:
        assert len(plan.candidates) == 1 or sum(expected_bytes(c, recipe) for c in plan.candidates) <= target_mb * 1e6


def test_of_equal_bytes_the_first_source_stays():
    plans, duplicates = planned([candidate(n, key="ab" * 16) for n in (3, 1, 2)])
    assert [c.source for c in plans[0].candidates] == ["1.jpg"]
    assert [left.source for left in duplicates] == ["2.jpg", "3.jpg"]


def test_nothing_found_makes_no_shards():
    assert planned([]) == ([], [])


@settings(deadline=None, max_examples=50)
@given(st.permutations(range(12)))
def test_a_listing_has_one_fingerprint_whatever_its_order(order):
    found = [candidate(n).found for n in range(12)]
    assert fingerprint([found[n] for n in order]) == fingerprint(found)
    assert fingerprint(found[1:]) != fingerprint(found)
    assert fingerprint([found[0]._replace(stamp="later"), *found[1:]]) != fingerprint(found)


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
            assert set(json.loads(sample["json"])) == {
                "source",
                "source_sha256",
                "label",
                "artist",
                "style",
                "source_size",
            }
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
    assert version.books["quarantined"] == 1
    assert version.books["reasons"] == {"truncated": 1}


def close_books(rows, shards, listed=None):
    books = Books(shards, listed)
    for row in rows:
        books.count(row)
    return books.close()


def test_books_that_do_not_balance_are_refused():
    def kept(number, shard, offset):
        return {**row_of(candidate(number), "kept"), "shard": shard, "offset": offset}

    shards = [Shard("a.tar", rows=2, bytes=1, sha256=""), Shard("b.tar", rows=1, bytes=1, sha256="")]
    good = [kept(0, "a.tar", 512), kept(1, "a.tar", 2048), kept(2, "b.tar", 512)]
    assert close_books(good, shards, 3)["kept"] == 3
    with pytest.raises(DatasetError, match="4 images were listed, 3 are told of"):
        close_books(good, shards, 4)
    with pytest.raises(DatasetError, match=r"a\.tar holds 2 samples, the manifest lists 1"):
        close_books(good[1:], shards)
    with pytest.raises(DatasetError, match=r"0\.jpg is not where the shards' order puts it"):
        close_books([good[1], good[0], good[2]], shards)
    with pytest.raises(DatasetError, match=r"2\.jpg is not where"):
        close_books([*good[:2], kept(2, "c.tar", 512)], shards)
    with pytest.raises(DatasetError, match="do not balance"):
        close_books([row_of(candidate(0), "forgotten")], [])


def test_a_catalog_takes_over_what_the_parent_found(tmp_path):
    """The same file is not found again, its bytes elsewhere are a duplicate, and what was removed stays removed."""
    kept, removed, refused, new = (candidate(number) for number in range(4))
    catalog = Catalog(tmp_path / "catalog.sqlite")
    there = [row_of(kept, "kept"), row_of(removed, "excluded", "removed_by_key"), row_of(refused, "quarantined", "cut")]
    catalog.add_parent(there)
    for one in (kept, removed):
        catalog.add(one)
    assert not catalog.set_outside(row_of(refused, "quarantined", "cut"))
    assert (catalog.has_news, catalog.known) == (False, 3)
    for number, one in enumerate((kept, removed), 4):
        catalog.add(one._replace(found=candidate(number).found))
    catalog.add(new)
    assert catalog.set_outside(row_of(candidate(6), "quarantined", "empty"))
    assert (catalog.has_news, catalog.known) == (True, 3)
    assert list(catalog.candidates()) == [new]
    outside = [(row["source"], row["state"], row["reason"]) for row in catalog.outside()]
    assert outside == [
        ("1.jpg", "excluded", "removed_by_key"),
        ("2.jpg", "quarantined", "cut"),
        ("4.jpg", "duplicate", "same_bytes"),
        ("5.jpg", "excluded", "removed_before"),
        ("6.jpg", "quarantined", "empty"),
    ]
    assert [row["source"] for row in catalog.outside_examples(1)] == ["6.jpg"]
    catalog.close()


@pytest.mark.parametrize("both", [False, True])
def test_what_could_not_be_read_again_for_the_parent_is_added_once(tmp_path, both):
    """Its bytes were read for its key; then it was away."""
    catalog = Catalog(tmp_path / "catalog.sqlite")
    rows = [row_of(candidate(1), "quarantined", "vanished"), row_of(candidate(1), "kept")]
    catalog.add_parent(rows if both else rows[:1])
    assert not catalog.set_outside(row_of(candidate(1), "quarantined", "vanished"))
    catalog.add(candidate(1))
    assert list(catalog.candidates()) == ([] if both else [candidate(1)])
    assert [row["reason"] for row in catalog.outside()] == ["vanished"]
    catalog.close()


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(6)))
def test_what_is_excluded_takes_its_copies_with_it_whatever_the_order(order):
    """Images 0 and 1 are excluded; 2 has the bytes of both."""
    with tempfile.TemporaryDirectory() as folder:
        catalog = Catalog(Path(folder) / "catalog.sqlite")
        for number in order:
            one = candidate(number, key="ab" * 16 if number < 3 else None)
            if number < 2:
                catalog.exclude(one, "excluded_by_artist", "artist:a")
            else:
                catalog.add(one)
        catalog.exclude_copies()
        assert sorted(one.source for one in catalog.candidates()) == ["3.jpg", "4.jpg", "5.jpg"]
        assert [(row["source"], row["state"], row["reason"], row["detail"]) for row in catalog.outside()] == [
            ("0.jpg", "excluded", "excluded_by_artist", "artist:a"),
            ("1.jpg", "excluded", "excluded_by_artist", "artist:a"),
            ("2.jpg", "excluded", "excluded_with_a_copy", "it has the bytes of 0.jpg"),
        ]
        catalog.close()


def test_a_plan_travels():
    """As the driver writes it and the task that writes its shard reads it."""
    member = candidate(1)._replace(found=candidate(1).found._replace(member=Member(1, 2, 8, 0, 3)))
    (plan,), _ = planned([candidate(0), member])
    assert ShardPlan.from_json(plan.to_json()) == plan


def test_a_damaged_manifest_is_refused(photos, tmp_path):
    version = build_version(photos, str(tmp_path))
    path = Path(manifest_uri(version.root, version.version))
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 3] ^= 1
    for damaged in (bytes(changed), whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        for read in (version.samples, lambda: list(version.rows())):
            with pytest.raises(DatasetError, match="is not the manifest that was written"):
                read()
    path.write_bytes(whole)
    assert list(version.rows()) == list(version.rows())
    path.unlink()
    for read in (version.samples, lambda: list(version.rows())):
        with pytest.raises(DatasetError, match="found none there"):
            read()


def test_a_disk_that_is_full_is_told_with_its_path(tmp_path):
    catalog = Catalog(tmp_path / "catalog.sqlite")
    catalog._rows.execute("PRAGMA max_page_count = 12")

    def fill():
        for number in range(10_000):
            catalog.add(candidate(number))

    with pytest.raises(OSError, match=r"full: about a kilobyte an image.*TMPDIR.*catalog\.sqlite"):
        fill()


def test_what_is_not_there_is_said(tmp_path, content_version):
    with pytest.raises(UsageError, match=r"found no LATEST in it; pipelines/shard\.py makes one"):
        open_version(str(tmp_path))
    with pytest.raises(UsageError, match=r"no LATEST in it.*a version, 16 hex digits, is named behind an @"):
        open_version(f"{tmp_path}/me@home")
    with pytest.raises(UsageError, match=f"has no version abc; it has {content_version.version}"):
        open_version(f"{content_version.root}@abc")


def test_listing_is_sorted_labelled_and_skips_what_is_hidden(tmp_path):
    for name in ("b/z.JPG", "b/a.png", "a/é 写.jpeg", "c.tif", ".hidden.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = list_images((str(tmp_path),))
    assert [f.source for f in found] == ["a/é 写.jpeg", "b/a.png", "b/z.JPG", "c.tif"]
    assert [f.label for f in found] == ["a", "b", "b", ""]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ("nothing", "found nothing there"),
        ("file", "found a file"),
        ("empty", "an empty folder or archive"),
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
    plans, _ = planned([candidate(n) for n in range(100)], RecipeConfig(target_mb=0.08, short_side=64))
    first = [int(c.source.removesuffix(".jpg")) for c in plans[0].candidates]
    assert len(plans) > 3
    assert np.std(first) > 15


def test_of_a_manifest_of_many_row_groups_the_rows_of_a_shard_are_read(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "_ROWS_AT_ONCE", 5)
    version = build_version(photos, str(tmp_path))
    uri, first, groups = manifest_uri(version.root, version.version), 0, []
    read = pq.ParquetFile.read_row_groups
    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", lambda file, some: groups.append(some) or read(file, some))
    assert len(version.shards) > 3
    for shard in version.shards:
        expected = [row for row in version.rows() if row["shard"] == shard.name]
        assert manifest.rows_of_shard(uri, shard, first=first) == expected
        first += shard.rows
    assert groups[-1][0] > 0
    assert max(map(len, groups)) <= 3
