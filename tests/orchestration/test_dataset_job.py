"""Adding to a dataset, taking away from it, reading all of it: on a real Ray cluster, as commands."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from adaconv import storage
from adaconv.config.dataset import AppendConfig, RemoveConfig
from adaconv.data.changes import describe_versions, roll_back
from adaconv.data.manifest import open_version
from adaconv.data.synthetic import generate_photos
from adaconv.errors import DatasetError, UsageError
from adaconv.orchestration.dataset_job import run_append, run_remove
from tests.helpers import build_version, child_of
from tests.orchestration.runs import dataset, hashes_of, run, shard

pytestmark = pytest.mark.ray


@pytest.fixture
def root(undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "data")
    return tmp_path / "data"


def result_of(root):
    return json.loads((Path(root) / "result.json").read_text())


def test_appending_writes_new_shards_alone(cluster, images, root, tmp_path):
    parent = open_version(str(root))
    more = tmp_path / "more"
    generate_photos(more, 1, seed=9, size=144)
    shutil.copy(images / "photo_00030.jpg", more / "known.jpg")
    dataset(cluster, "append", "--dataset", root, "--source", more)
    child = open_version(str(root))
    assert child.parent == parent.version
    assert child.shards[: len(parent.shards)] == parent.shards
    written = result_of(root)["bytes_written"]
    assert 0 < written == sum(shard.bytes for shard in child.shards[len(parent.shards) :])
    assert written < 0.03 * sum(shard.bytes for shard in child.shards)
    assert child.books["found"] == parent.books["found"] + 2
    assert child.books["duplicate"] == parent.books["duplicate"] + 1
    before = hashes_of(root)
    dataset(cluster, "append", "--dataset", root, "--source", more)  # all of it is there: nothing changes
    after = hashes_of(root)
    assert {p: h for p, h in after.items() if not p.startswith("builds/")} == {
        p: h for p, h in before.items() if not p.startswith("builds/")
    }
    assert "nothing to do" in shard(cluster, images, root).stdout  # the first build again leaves the newer version
    assert open_version(str(root)).version == child.version


def test_removing_rewrites_the_shards_concerned_alone(cluster, images, root):
    parent = open_version(str(root))
    kept = [row for row in parent.rows() if row["state"] in ("kept", "repaired")]
    gone = [row for row in kept if row["label"] == "more/of.them"]
    gone.append(next(row for row in kept if row["source"] in ("again.jpg", "photo_00020.jpg")))
    key, why = gone[-1]["key"], "asked for by its author"
    dry = dataset(cluster, "remove", "--dataset", root, "--key", key, "--label", "more", "--dry-run")
    assert "11 images to remove" in dry.stdout
    dataset(cluster, "remove", "--dataset", root, "--key", key, "--label", "more", "--why", why)
    child = open_version(str(root))
    concerned = {row["shard"] for row in gone}
    assert {s.name for s in parent.shards} - {s.name for s in child.shards} == concerned
    assert result_of(root)["removed"] == 12  # one of them was found twice
    assert child.books["excluded"] == 12
    assert child.books["found"] == parent.books["found"]
    rows = [row for row in child.rows() if row["state"] == "excluded"]
    assert {row["reason"] for row in rows} == {"removed_by_key", "removed_by_label"}
    assert {row["detail"] for row in rows} == {why}
    assert not set(child.samples()["key"].to_pylist()) & {row["key"] for row in gone}
    assert dataset(cluster, "verify", "--dataset", root).returncode == 0
    again = dataset(cluster, "remove", "--dataset", root, "--label", "more", "--key", key)
    assert "nothing to do" in again.stdout
    # What was removed stays removed, though its files are still in the source.
    dataset(cluster, "append", "--dataset", root, "--source", images)
    assert open_version(str(root)).version == child.version


def test_not_all_images_of_a_version_are_removed(photos, tmp_path):
    version = build_version(photos, str(tmp_path))
    with pytest.raises(UsageError, match=rf"expected images to be left of version {version.version}, .* would go"):
        run_remove(RemoveConfig(dataset=version.root, source_pattern=("*",)))
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_what_a_list_excludes_gets_into_no_shard(cluster, images, undisturbed, root, tmp_path):
    """Not when a version is made, nor by what is added to it."""
    twice = hashlib.sha256((images / "again.jpg").read_bytes()).hexdigest()
    listed, renamed = tmp_path / "listed.txt", tmp_path / "renamed.txt"
    listed.write_text(f"label:more\nsha256:{twice}\nsource:photo_0003?.jpg\nsource:cut.*\nartist:nobody\n")
    renamed.write_text(f"# sorted\nartist:nobody\n{listed.read_text()}")
    done = shard(cluster, images, tmp_path / "made", "--exclude", listed)
    assert "artist:nobody: no image has it" in done.stdout
    made = open_version(str(tmp_path / "made"))
    assert made.books["reasons"] == {"excluded_by_label": 10, "excluded_by_sha256": 2, "excluded_by_source": 11}
    assert (made.books["excluded"], made.books["quarantined"], made.books["found"]) == (23, 0, 62)
    counts = {"label:more": 10, f"sha256:{twice}": 2, "source:photo_0003?.jpg": 10, "source:cut.*": 1}
    assert result_of(tmp_path / "made")["excluded"] == counts
    whole = open_version(str(undisturbed[0]))
    unwanted = {row["key"] for row in made.rows() if row["state"] == "excluded"}
    assert set(made.samples()["key"].to_pylist()) == set(whole.samples()["key"].to_pylist()) - unwanted
    assert len(unwanted & set(whole.samples()["key"].to_pylist())) == 21
    assert "nothing to do" in shard(cluster, images, tmp_path / "made", "--exclude", renamed).stdout

    more = tmp_path / "more_of_it"
    generate_photos(more / "more", 2, seed=9, size=144)
    generate_photos(more / "other", 1, seed=10, size=144)
    shutil.copy(images / "photo_00030.jpg", more / "other" / "renamed.jpg")
    added = ("append", "--dataset", tmp_path / "made", "--source", more)
    assert "made with a list" in dataset(cluster, *added, code=2).stderr
    dataset(cluster, *added, "--exclude", listed)
    child = open_version(str(tmp_path / "made"))
    news = {row["source"]: row["reason"] for row in child.rows() if row["source"].startswith(("more/photo", "other/"))}
    assert sorted(news.items()) == [
        ("more/photo_00000.jpg", "excluded_by_label"),
        ("more/photo_00001.jpg", "excluded_by_label"),
        ("other/photo_00000.jpg", ""),
        ("other/renamed.jpg", "removed_before"),
    ]
    there = dataset(cluster, "append", "--dataset", root, "--source", images, "--exclude", listed)
    assert "22 of them lie in the dataset's shards already" in there.stdout
    assert open_version(str(root)).version == whole.version
    dataset(cluster, "remove", "--dataset", root, "--exclude", listed)
    left = open_version(str(root))
    assert set(left.samples()["key"].to_pylist()) == set(made.samples()["key"].to_pylist())
    assert left.recipe == made.recipe
    assert "made with a list" in dataset(cluster, "append", "--dataset", root, "--source", images, code=2).stderr


def test_verify_names_what_is_damaged(cluster, root, tmp_path):
    version = open_version(str(root))
    row = next(version.rows())
    path = Path(version.shard_uri(row["shard"]))
    data = bytearray(path.read_bytes())
    data[row["offset"] + 100] ^= 4
    path.write_bytes(data)
    done = dataset(cluster, "verify", "--dataset", root, "--output", tmp_path / "out", code=1)
    assert f"shards/{row['shard']}" in done.stderr
    assert row["source"] in done.stderr
    (damage,) = result_of(tmp_path / "out")["damages"]
    assert (damage["key"], damage["what"]) == (row["key"], "its bytes have changed")


def test_versions_on_an_object_store_are_listed_and_rolled_back(photos, bucket):
    root = f"{bucket}/data"
    first = build_version(photos, root)
    second = child_of(first, 2)
    told = describe_versions(root)
    assert {(one["version"], one["latest"]) for one in told} == {(first.version, False), (second.version, True)}
    assert roll_back(root, first.version) == second.version
    assert open_version(root) == first
    storage.remove(first.shard_uri(second.shards[0].name))
    with pytest.raises(DatasetError, match="is not whole: 1 of 3 files"):
        roll_back(root, second.version)
    assert open_version(root) == first


def test_what_lacks_shards_is_neither_added_to_nor_taken_from(photos, tmp_path):
    """Not even where there is nothing to add or to take: that would say that all is well."""
    version = build_version(photos, str(tmp_path / "data"))
    child = child_of(version, 3)
    Path(child.shard_uri(child.shards[0].name)).unlink()
    words = rf"1 of 3 shards of .*@{child.version} are not there.* with --dataset {version.root}@{version.version}: "
    with pytest.raises(DatasetError, match=words):
        run_append(AppendConfig(dataset=child.root, source=(str(photos),)), listing=None, exclusions=(), after=None)
    with pytest.raises(DatasetError, match=words):
        run_remove(RemoveConfig(dataset=child.root, label=("landscape",)))


@pytest.mark.slow
def test_what_verify_advises_makes_a_damaged_version_whole(cluster, images, root, tmp_path):
    first = open_version(str(root))
    more = tmp_path / "more"
    generate_photos(more, 1, seed=9, size=144)
    steps = (
        lambda: shard(cluster, images, root),
        lambda at="": dataset(cluster, "append", "--dataset", f"{root}{at}", "--source", more),
        lambda at="": dataset(cluster, "remove", "--dataset", f"{root}{at}", "--label", "more"),
    )
    for step in steps[1:]:
        step()
    version, before = open_version(str(root)), hashes_of(root)
    second = open_version(f"{root}@{version.parent}")
    of_append = next(s for s in second.shards if s not in first.shards)
    of_removal = next(s for s in version.shards if s not in second.shards)
    for damaged in (of_append, of_removal):
        Path(version.shard_uri(damaged.name)).write_bytes(b"damaged")
    done = dataset(cluster, "verify", "--dataset", root, "--output", tmp_path / "out", code=1)
    assert f"with --dataset {root}@{first.version}, --dataset {root}@{second.version}: what is missing" in done.stderr
    told = {damage["file"] for damage in result_of(tmp_path / "out")["damages"]}
    assert told == {f"shards/{damaged.name}" for damaged in (of_append, of_removal)}
    for damaged in (of_append, of_removal):
        Path(version.shard_uri(damaged.name)).unlink()
    for step, at in zip(steps, ((), (f"@{first.version}",), (f"@{second.version}",)), strict=True):
        step(*at)
    assert dataset(cluster, "verify", "--dataset", root).returncode == 0
    assert open_version(str(root)).version == version.version
    assert hashes_of(root) == before


def test_the_tars_are_read_by_ray_data_as_they_are(cluster, undisturbed):
    root = undisturbed[0]
    script = f"""
import ray
ray.init(log_to_driver=False, logging_level="ERROR")
rows = ray.data.read_webdataset({str(root / "shards")!r}).take_all()
print(sorted(row["__key__"] for row in rows), {{row["jpg"].shape[2] for row in rows}}, rows[0]["json"]["source_size"])
"""
    import sys

    done = run(cluster, [sys.executable, "-c", script], 0)
    keys = sorted(open_version(str(root)).samples()["key"].to_pylist())
    assert str(keys) in done.stdout
    assert "{3} [" in done.stdout
