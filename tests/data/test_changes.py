"""Versions that follow from versions: what verify finds, what a removal leaves, what may be deleted."""

import dataclasses
import io
import json
import os
import random
import shutil
import tarfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from adaconv import storage
from adaconv.config.dataset import SimilarConfig
from adaconv.data import changes
from adaconv.data.changes import by_shard, collect, describe_versions, diff, find_garbage, roll_back
from adaconv.data.manifest import (
    IN_SHARDS,
    advance_latest,
    how_to_mend,
    latest_uri,
    latest_version,
    lineage,
    list_versions,
    manifest_uri,
    open_version,
    publish_version,
    version_uri,
)
from adaconv.data.report import render
from adaconv.data.shard_writer import rewrite_shard
from adaconv.data.verify import verify_manifest, verify_shard
from adaconv.errors import AdaConvError, DatasetError, UsageError
from adaconv.stylize.inputs import list_items
from pipelines.dataset import similar
from tests.helpers import RECIPE, build_version, child_of


@pytest.fixture
def version(content_version, tmp_path):
    """A copy that may be damaged."""
    shutil.copytree(content_version.root, tmp_path / "data")
    return open_version(str(tmp_path / "data"))


def verify(version):
    rows = dict(by_shard(version.rows())) if not verify_manifest(version) else {}
    damages = verify_manifest(version)
    for shard in version.shards:
        damages += verify_shard(version.root, shard, lambda name=shard.name: rows.get(name))
    return damages


def test_a_whole_version_has_no_damage(version):
    assert verify(version) == []


def test_any_changed_byte_is_located(version):
    """100 random bytes of all the version's files; in a shard, down to the sample whose bytes hold it."""
    draw = random.Random(0)
    root = Path(version.root)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    weights = [path.stat().st_size for path in files]
    rows = dict(by_shard(version.rows()))
    hit = {"shards": 0, "other": 0}
    for number in range(100):
        path = draw.choices(files, weights)[0] if number % 4 else draw.choice(files)
        whole = path.read_bytes()
        place = draw.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ draw.randrange(1, 256)]) + whole[place + 1 :])
        if path.parent.name == "shards":
            (damage,) = verify(version)
            assert damage.file == f"shards/{path.name}"
            assert damage.start <= place < damage.end
            inside = [r for r in rows[path.name] if r["offset"] - 512 <= place < r["offset"] - 512 + r["span"]]
            assert damage.key == (inside[0]["key"] if inside else "")
            hit["shards"] += 1
        elif path.parent.name == "manifests":
            assert [damage.file for damage in verify(version)] == [f"manifests/{path.name}"]
        else:
            with pytest.raises(AdaConvError, match=r"versions/|has no version"):
                open_version(version.root)
            hit["other"] += 1
        path.write_bytes(whole)
    assert min(hit.values()) >= 5
    assert verify(version) == []


def test_any_missing_byte_is_located(version):
    draw = random.Random(1)
    for _ in range(30):
        shard = draw.choice(version.shards)
        path = Path(version.shard_uri(shard.name))
        whole = path.read_bytes()
        place = draw.randrange(len(whole))
        path.write_bytes(whole[:place] + whole[place + 1 :])
        damages = verify(version)
        assert {damage.file for damage in damages} == {f"shards/{shard.name}"}
        assert f"expected {shard.bytes} bytes, found {shard.bytes - 1}" in damages[0].what
        rows = dict(by_shard(version.rows()))[shard.name]
        first = next((r for r in rows if r["offset"] - 512 + r["span"] > place), None)
        if first and whole[place : first["offset"] - 512 + first["span"]].strip(whole[place : place + 1]):
            assert first["key"] in {damage.key for damage in damages}
        path.write_bytes(whole)


def test_a_shard_cut_at_a_member_is_found_though_readers_take_it_for_whole(tmp_path, photos):
    import webdataset

    version = build_version(photos, str(tmp_path), RECIPE.model_copy(update={"target_mb": 100}))
    (shard,) = version.shards
    path = Path(version.shard_uri(shard.name))
    rows = dict(by_shard(version.rows()))[shard.name]
    whole = path.read_bytes()
    path.write_bytes(whole[: rows[10]["offset"] - 512])
    assert len(list(webdataset.WebDataset(str(path), shardshuffle=False))) == 10  # and no error
    damages = verify(version)
    assert {damage.key for damage in damages if damage.key} == {row["key"] for row in rows[10:]}
    assert {damage.what for damage in damages if damage.key} == {"it is gone"}


def test_a_missing_shard_is_found(version):
    Path(version.shard_uri(version.shards[1].name)).unlink()
    (damage,) = verify(version)
    assert damage.file == f"shards/{version.shards[1].name}"
    assert "it is not there" in str(damage)


def test_shards_are_byte_for_byte_what_webdataset_writes(content_version):
    import webdataset

    for shard in content_version.shards:
        written = Path(content_version.shard_uri(shard.name)).read_bytes()
        again = io.BytesIO()
        options = {"encoder": False, "mtime": 0, "user": "", "group": "", "mode": 0o644}
        with tarfile.open(fileobj=io.BytesIO(written)) as tar, webdataset.TarWriter(again, **options) as writer:
            members = [(member.name, tar.extractfile(member).read()) for member in tar]
            for (name, jpeg), (_, told) in zip(members[::2], members[1::2], strict=True):
                writer.write({"__key__": name.removesuffix(".jpg"), "jpg": jpeg, "json": told})
        assert again.getvalue() == written


def test_a_shard_written_without_some_samples_is_what_writing_the_others_gives(photos, tmp_path):
    """Copying the bytes of the samples that stay, against building a version of their images alone."""
    recipe = RECIPE.model_copy(update={"target_mb": 100})
    whole = build_version(photos, str(tmp_path / "whole"), recipe)
    rows = [row for row in whole.rows() if row["state"] in IN_SHARDS]
    folder = tmp_path / "fewer"
    shutil.copytree(photos, folder)
    for row in rows[::3]:
        (folder / row["source"]).unlink()
    fewer = build_version(folder, str(tmp_path / "data"), recipe)
    left = [row for number, row in enumerate(rows) if number % 3]
    assert rewrite_shard(whole.root, left) == fewer.shards[0]
    assert left == [row for row in fewer.rows() if row["state"] in IN_SHARDS]


def test_a_damaged_shard_is_not_rewritten(version):
    name, rows = next(by_shard(version.rows()))
    path = Path(version.shard_uri(name))
    data = bytearray(path.read_bytes())
    data[rows[0]["offset"] + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=f"sample {rows[0]['key']}.*verify"):
        rewrite_shard(version.root, rows)


def test_a_job_that_was_overtaken_publishes_nothing(version):
    child = child_of(version, 3)
    with pytest.raises(DatasetError, match=f"another job published version {child.version}.*expected LATEST to be"):
        child_of(version, 2)
    assert open_version(version.root).version == child.version
    assert list_versions(version.root) == sorted([child.version, version.version])
    assert child_of(version, 3).version == child.version  # the same job, started twice


@pytest.mark.parametrize("lost", [False, True])
def test_a_version_that_is_made_again_does_not_take_the_place_of_what_came_of_it(version, lost, caplog):
    """Else what was removed since would be back in LATEST."""
    child = child_of(version, 3)
    rows, latest = list(version.rows()), child.version
    if lost:
        storage.remove(version_uri(version.root, version.version))
    with caplog.at_level("INFO"):
        again = publish_version(version.root, recipe=version.recipe, shards=version.shards, rows=rows, after=latest)
    assert again == version
    assert open_version(version.root).version == child.version
    assert f"LATEST stays version {child.version}, which was made from version {version.version}" in caplog.text


def test_latest_stays_where_what_it_was_made_from_cannot_be_read(version, caplog):
    """`shard.py` with nothing to do moved it back: what was removed since was in it again."""
    child = child_of(version, 3)
    newest = child_of(child, 2)
    Path(version_uri(version.root, child.version)).write_text("{")
    advance_latest(version.root, version.version)
    assert latest_version(version.root) == newest.version
    assert f"LATEST stays version {newest.version}: what that was made from cannot be read" in caplog.text
    Path(version_uri(version.root, newest.version)).write_text("{")
    advance_latest(version.root, version.version)  # what nobody can read gives way
    assert latest_version(version.root) == version.version


def test_a_rollback_names_a_version_that_is_whole(version):
    child = child_of(version, 1)
    lost = Path(version.shard_uri(version.shards[2].name))
    manifest = Path(manifest_uri(version.root, version.version))
    for path, left in ((lost, None), (lost, 100), (manifest, 100)):
        whole = path.read_bytes()
        path.unlink()
        if left:
            path.write_bytes(whole[:left])
        with pytest.raises(
            DatasetError, match=f"is not whole: 1 of {len(version.shards) + 1} files, the first is .*{path.name}"
        ):
            roll_back(version.root, version.version)
        assert open_version(version.root) == child
        path.write_bytes(whole)
    assert roll_back(version.root, version.version) == child.version
    assert open_version(version.root) == version
    Path(latest_uri(version.root)).unlink()  # lost: a rollback is how to have it again
    assert roll_back(version.root, child.version) is None
    assert open_version(version.root) == child


def test_a_rollback_that_was_overtaken_moves_nothing(version, monkeypatch):
    child = child_of(version, 2)
    checked, others = changes.require_whole, []

    def publish_meanwhile(root, name):
        others.append(child_of(child, 1))
        return checked(root, name)

    monkeypatch.setattr(changes, "require_whole", publish_meanwhile)
    with pytest.raises(DatasetError, match="another job published version"):
        roll_back(version.root, version.version)
    assert open_version(version.root) == others[0]


def test_a_job_that_began_before_a_rollback_publishes_nothing(version):
    child = child_of(version, 2)
    roll_back(version.root, version.version)
    with pytest.raises(DatasetError, match="another job published version"):
        child_of(child, 1)


def test_versions_know_where_they_come_from(version):
    child = child_of(version, 3)
    assert child.parent == version.version
    assert [one.version for one in lineage(child)] == [child.version, version.version]
    assert open_version(version.root).version == child.version


def test_a_difference_counts_samples_and_bytes(version):
    child = child_of(version, 3)
    told = diff(child, version)
    assert (told["added"], told["shards_new"], told["bytes_new"], told["shards_shared"]) == (0, 0, 0, 3)
    assert told["removed"] == sum(shard.rows for shard in version.shards[3:])
    assert len(told["removed_sources"]) == min(20, told["removed"])
    assert told["recipe_differs"] == {}
    json.dumps(told)


def test_whoever_asks_of_samples_reads_each_manifest_once_and_the_columns_it_needs(version, monkeypatch):
    child = child_of(version, 3)
    read_table, columns = pq.read_table, []
    monkeypatch.setattr(pq, "read_table", lambda *a, **how: columns.append(how["columns"]) or read_table(*a, **how))
    diff(child, version)
    assert columns == [["key", "source"]] * 2
    asked = [
        (lambda: similar(SimilarConfig(dataset=version.root, against=child.root)), 2, 3),
        (lambda: render(version, distance=4, sheet=3), 1, 9),
        (lambda: list_items((version.root,), flag="--content"), 1, 4),
    ]
    for ask, manifests, wide in asked:
        columns.clear()
        ask()
        assert list(map(len, columns)) == [wide] * manifests


def test_garbage_is_what_no_kept_version_needs(version):
    child = child_of(version, 3)
    root = Path(version.root)
    (root / "shards" / "0123456789abcdef.tar").write_bytes(b"orphan")
    (root / "shards" / ".x.tar.tmp-1").write_bytes(b"cut off")
    (root / "notes.txt").write_text("not ours")
    orphans = {"shards/0123456789abcdef.tar", "shards/.x.tar.tmp-1"}
    young = find_garbage(version.root, keep_last=None, older_than_hours=1)
    assert (young.versions, young.files) == ((), ())
    old = find_garbage(version.root, keep_last=None, older_than_hours=0)
    assert {entry.path for entry in old.files} == orphans
    one = find_garbage(version.root, keep_last=1, older_than_hours=0)
    assert one.versions == (version.version,)
    assert one.files[0].path == f"versions/{version.version}.json"  # first: nobody opens what is half gone
    collect(one)
    assert verify(child) == []
    left = {entry.path for entry in storage.walk(version.root, hidden=True)}
    assert left == {
        *("LATEST", "notes.txt", f"versions/{child.version}.json", f"manifests/{child.version}.parquet"),
        *(f"shards/{shard.name}" for shard in child.shards),
    }


def test_what_a_running_build_may_need_is_no_garbage(version):
    """Its first notes and shards are older than a day once it runs for longer."""
    root, now = Path(version.root), time.time()
    ages = {"work/ab/scan/1.jsonl": 30, "work/ab/shard/2.parquet": 1, "work/cd/scan/1.jsonl": 30, "shards/ef.tar": 30}
    for name, hours in ages.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
        os.utime(root / name, (now - hours * 3600,) * 2)

    def found():
        return {entry.path for entry in find_garbage(version.root, keep_last=None, older_than_hours=24).files}

    assert found() == {"work/cd/scan/1.jsonl"}
    os.utime(root / "work/ab/shard/2.parquet", (now - 30 * 3600,) * 2)
    assert found() == set(ages)


def test_what_is_published_while_garbage_is_looked_for_stays_whole(version):
    child = child_of(version, 3)
    mark = Path(version_uri(child.root, child.version)).read_bytes()
    Path(version_uri(child.root, child.version)).unlink()
    storage.publish_bytes(latest_uri(version.root), version.version.encode())
    only_its = Path(version.root) / "shards" / "0123456789abcdef.tar"
    only_its.write_bytes(b"of nobody")
    garbage = find_garbage(version.root, keep_last=1, older_than_hours=0)
    assert {entry.path for entry in garbage.files} == {f"shards/{only_its.name}", f"manifests/{child.version}.parquet"}
    storage.publish_bytes(version_uri(child.root, child.version), mark)  # a job ends now
    collect(garbage)
    assert verify(child) == []
    assert not only_its.exists()

    garbage = find_garbage(version.root, keep_last=1, older_than_hours=0)
    assert garbage.versions == (child.version,)
    storage.publish_bytes(latest_uri(version.root), child.version.encode())
    with pytest.raises(DatasetError, match="nothing was deleted"):
        collect(garbage)
    assert verify(child) == []


def test_shards_that_are_collected_while_books_are_closed_are_missed(version):
    """A manifest of ten million rows takes its time."""

    def rows():
        yield from (row for row in version.rows() if row["state"] in IN_SHARDS)
        Path(version.shard_uri(version.shards[-1].name)).unlink()

    with pytest.raises(DatasetError, match=r"1 of \d+ shards are not below .* any more"):
        publish_version(version.root, recipe=version.recipe, shards=version.shards, rows=rows(), after=version.version)
    assert list_versions(version.root) == [version.version]


def test_a_stray_file_among_the_versions_is_none(version):
    """Such as an editor leaves: it ended every gc and trace."""
    (Path(version.root) / "versions" / f"{version.version}.json~").write_text("{}")
    (Path(version.root) / "versions" / "notes.json").write_text("{}")
    assert list_versions(version.root) == [version.version]
    assert [told["version"] for told in describe_versions(version.root)] == [version.version]
    assert find_garbage(version.root, keep_last=None, older_than_hours=1).versions == ()


def test_nothing_is_garbage_where_a_version_cannot_be_read(version):
    path = Path(version.root) / "versions" / f"{version.version}.json"
    path.write_text(path.read_text().replace('"kept"', '"kepd"'))
    with pytest.raises(DatasetError, match="damaged"):
        find_garbage(version.root, keep_last=None, older_than_hours=0)
    Path(latest_uri(version.root)).unlink()
    with pytest.raises(UsageError, match="a whole dataset"):
        find_garbage(f"{version.root}@{version.version}", keep_last=1, older_than_hours=0)
    with pytest.raises(UsageError, match="no LATEST"):
        find_garbage(version.root, keep_last=None, older_than_hours=0)


def test_a_version_whose_shards_were_deleted_is_not_published(version):
    Path(version.shard_uri(version.shards[0].name)).unlink()
    with pytest.raises(DatasetError, match=r"1 of 3 shards are not below .* any more"):
        child_of(version, 3)


def test_what_mends_a_version_is_named_with_what_each_command_was_given(version):
    child = child_of(child_of(version, 3), 2)
    assert how_to_mend(version) == (
        "run pipelines/shard.py with the same sources: what is missing is made again, byte for byte"
    )
    assert (
        f"that followed, in their order, with --dataset {version.root}@{version.version}, --dataset "
        f"{version.root}@{child.parent}: what is missing"
    ) in how_to_mend(child)
    first = Path(version_uri(version.root, version.version))
    first.write_bytes(first.read_bytes()[:-5])
    assert "copy it from a backup: of what it was made from, too, something is damaged" in how_to_mend(child)
    first.unlink()
    assert f"from a backup: version {version.version}, which it was made from, is gone" in how_to_mend(child)


def test_a_version_stays_as_it_is_when_another_is_published(version):
    before = dataclasses.asdict(version)
    child_of(version, 2)
    assert dataclasses.asdict(open_version(f"{version.root}@{version.version}")) == before
