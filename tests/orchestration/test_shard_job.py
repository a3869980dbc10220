"""Shards on a real Ray cluster: the same bytes whatever happens, on a disk and on an S3 server."""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image, PngImagePlugin

from adaconv import storage
from adaconv.data.changes import by_shard
from adaconv.data.manifest import open_version
from adaconv.data.plan import ShardPlan
from adaconv.data.sources import iter_images
from adaconv.data.synthetic import generate_photos
from adaconv.orchestration import shard_job
from adaconv.orchestration.tasks import plain_errors
from tests.helpers import look_at
from tests.orchestration.runs import command, dataset, hashes_of, shard
from tests.servers import REPO

pytestmark = pytest.mark.ray
DATA = REPO.parent / "shared" / "data"


def test_the_books_balance(undisturbed):
    version = open_version(str(undisturbed[0]))
    books = version.books
    assert (books["found"], books["duplicate"], books["quarantined"]) == (62, 1, 1)
    assert books["found"] == sum(books[s] for s in ("kept", "repaired", "quarantined", "duplicate", "excluded"))
    assert books["reasons"] == {"same_bytes": 1, "truncated": 1}
    assert len(version.shards) > 8
    dotted = [row for row in version.rows() if row["label"] == "more/of.them"]
    assert {row["source"] for row in dotted} == {f"more/of.them/{n}. é 写.jpg" for n in range(10)}


def test_nothing_but_the_version_is_left(undisturbed):
    kinds = {path.partition("/")[0] for path in undisturbed[1]}
    assert kinds == {"shards", "manifests", "versions", "builds", "LATEST"}


def test_a_rerun_changes_nothing_and_starts_no_cluster(cluster, images, undisturbed):
    root, hashes = undisturbed[:2]
    before = {path: path.stat().st_mtime_ns for path in Path(root).rglob("*.*") if path.name != "result.json"}
    done = shard(cluster, images, root, "--for-nodes", 999)
    assert "nothing to do" in done.stdout
    assert "are too few for 999 nodes" in json.loads((root / "result.json").read_text())["warning"]
    assert "CPUs" not in done.stdout
    assert hashes_of(root) == hashes
    after = {path: path.stat().st_mtime_ns for path in Path(root).rglob("*.*") if path.name != "result.json"}
    assert after == before


def test_a_missing_shard_is_made_again_and_no_other(cluster, images, undisturbed, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(undisturbed[0], root)
    lost, *others = (root / "shards").iterdir()
    lost.unlink()
    before = [path.stat().st_mtime_ns for path in others]
    shard(cluster, images, root)
    assert hashes_of(root) == undisturbed[1]
    assert [path.stat().st_mtime_ns for path in others] == before
    assert json.loads((root / "result.json").read_text())["made"] == 1


def test_a_shard_of_other_images_than_planned_is_not_taken_for_the_plans(photos, content_version, tmp_path):
    """As where an image that could not be read when it was made can be read now, and moves the others."""
    candidates = {candidate.key: candidate for candidate in look_at(iter_images((str(photos),)))}
    planned = [[candidates[row["key"]] for row in rows] for _, rows in by_shard(content_version.rows())]

    def recalled(plans):
        work = str(tmp_path / str(len(plans[0])))
        jobs = [shard_job._publish_plan(work, ShardPlan(tuple(plan))) for plan in plans]
        shard_job._recall(jobs, work, content_version, None)
        noted = {Path(uri).stem for uri in storage.list_files(f"{work}/shard")}
        return [job["name"] in noted for job in jobs]

    assert recalled(planned) == [True] * len(planned)
    assert recalled([planned[0][:-1], *planned[1:]]) == [False, *[True] * (len(planned) - 1)]


def test_a_later_start_reads_again_what_could_not_be_read(cluster, images, undisturbed, tmp_path):
    root = tmp_path / "data"
    shard(cluster, images, root, "--budget.at-least", 0, "--budget.share", 0, code=1)
    (chunk,) = root.glob("work/*/scan/*.jsonl")
    answers = [json.loads(line) for line in chunk.read_text().splitlines()]
    answers[0]["refusal"] = {"reason": "vanished", "detail": "a server was away", "thumbnail": None}
    chunk.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    shard(cluster, images, root)
    assert hashes_of(root) == undisturbed[1]


@pytest.mark.slow
def test_a_finished_build_is_made_again_once_what_it_could_not_read_can_be_read(cluster, tmp_path):
    """As where a damaged archive is repaired by a copy that keeps its time."""
    generate_photos(tmp_path / "photos", 4, seed=1, size=64)
    archive = Path(shutil.make_archive(str(tmp_path / "photos"), "zip", tmp_path / "photos"))
    whole, listed = archive.read_bytes(), archive.stat()

    def sharded(data, root):
        archive.write_bytes(data)
        os.utime(archive, ns=(listed.st_atime_ns, listed.st_mtime_ns))
        return shard(cluster, archive, tmp_path / root).stdout, open_version(str(tmp_path / root))

    middle = len(whole) // 2
    damaged = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    _, before = sharded(damaged, "root")
    assert (before.books["kept"], before.books["quarantined"]) == (3, 1)
    assert "nothing to do" in sharded(damaged, "root")[0]
    shutil.copytree(tmp_path / "root", tmp_path / "grows")
    shutil.copytree(tmp_path / "root", tmp_path / "shrinks")
    dataset(cluster, "remove", "--dataset", tmp_path / "shrinks", "--key", next(before.rows())["key"])
    told, latest = sharded(whole, "shrinks")
    assert "append adds what can be read now" in told
    assert latest.parent == before.version
    told, after = sharded(whole, "root")
    assert "can be read now" in told
    assert after == dataclasses.replace(sharded(whole, "other")[1], root=after.root)
    assert after.books["kept"] == 4
    added = ("append", "--dataset", f"{tmp_path / 'grows'}@{before.version}", "--source", archive)
    assert "can be read now" not in dataset(cluster, *added).stdout
    assert "nothing to do" in dataset(cluster, *added).stdout
    assert open_version(str(tmp_path / "grows")).books["kept"] == 4


@pytest.mark.slow
def test_a_version_without_an_image_is_refused(cluster, tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.jpg").write_text(f"text {number}")
    done = shard(cluster, tmp_path / "images", tmp_path / "data", code=1)
    assert "all 3 images were refused or excluded; among them: " in done.stderr
    (tmp_path / "list.txt").write_text("source:*")
    done = shard(cluster, tmp_path / "images", tmp_path / "data", "--exclude", tmp_path / "list.txt", code=1)
    assert "all 3 images were refused or excluded. Nothing was published" in done.stderr
    assert not (tmp_path / "data" / "LATEST").exists()


@pytest.mark.parametrize(("error", "told"), [((28, "Full"), "Full"), ((28, "Full", "/x"), "Full: /x"), (("a",), "a")])
def test_an_error_of_the_system_has_one_argument(error, told):
    """So that Ray's advice, added as another one, is no path: a full disk is met in a write, which has none."""
    with pytest.raises(OSError, match=f"^{told}$") as raised, plain_errors():
        raise OSError(*error)
    assert raised.value.args == (told,)


def test_an_error_of_the_system_keeps_its_path(cluster, images, tmp_path):
    """Ray adds advice to an error's arguments, where the path's place is."""
    root = tmp_path / "data"
    root.mkdir()
    (root / "shards").write_text("in the way")
    done = shard(cluster, images, root, code=1)
    assert done.stderr.strip().endswith(f"File exists: {root}/shards")


@pytest.mark.parametrize("workers", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_workers_gives_the_same_bytes(cluster, images, undisturbed, tmp_path, workers):
    """From another folder, whose files were made in another order."""
    shuffled = tmp_path / "elsewhere"
    files = [path for path in images.rglob("*") if path.is_file()]
    random.Random(workers).shuffle(files)
    for path in files:
        target = shuffled / path.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    shard(cluster, shuffled, tmp_path / "data", "--scaling.num-workers", workers)
    assert hashes_of(tmp_path / "data") == undisturbed[1]


@pytest.mark.slow
def test_a_subset_is_a_version_of_what_was_taken(cluster, images, undisturbed, tmp_path):
    """The same from a folder and from an archive of it; its number is no part of the books, but of the recipe."""
    archive = shutil.make_archive(str(tmp_path / "images"), "zip", images)
    flags = ("--subset.limit", 6, "--subset.per-label", 4)
    for source, root in ((images, "data"), (archive, "zipped")):
        assert "6 of 62 images" in shard(cluster, source, tmp_path / root, *flags).stdout
    version = open_version(str(tmp_path / "data"))
    assert version.recipe["subset"] == {"limit": 6, "per_label": 4, "seed": 0, "of": 62}
    assert version.books["found"] == 6
    assert version.version == open_version(str(tmp_path / "zipped")).version
    assert {row["source"] for row in version.rows()} < {
        row["source"] for row in open_version(str(undisturbed[0])).rows()
    }
    assert "nothing to do" in shard(cluster, images, tmp_path / "data", *flags).stdout
    dataset(cluster, "append", "--dataset", tmp_path / "data", "--source", images)
    whole = open_version(str(tmp_path / "data"))
    assert (whole.recipe, whole.parent, whole.books["found"]) == (version.recipe, version.version, 62)


def kill_drivers(cluster, images, undisturbed, root, times, seed):
    """Kill the job at random moments, and start it again; where it finishes first, start over."""
    draw = random.Random(seed)
    _, hashes, seconds, _ = undisturbed
    killed = 0
    while killed < times:
        began = time.monotonic()
        driver = subprocess.Popen(command(images, root), env=cluster.environment, stdout=subprocess.DEVNULL)
        try:
            driver.wait(draw.uniform(0.2, 0.9) * seconds)
        except subprocess.TimeoutExpired:
            driver.kill()
            killed += 1
        if driver.wait() == 0:
            seconds = time.monotonic() - began
            assert hashes_of(root) == hashes
            storage.remove_directory(str(root))
    shard(cluster, images, root)
    assert hashes_of(root) == hashes


def kill_workers(cluster, images, undisturbed, root, times, seed):
    """Kill workers that are at it, at random moments, until enough have died; start over where the job is done."""
    draw = random.Random(seed)
    killed = 0
    while killed < times:
        driver = subprocess.Popen(command(images, root), env=cluster.environment, stdout=subprocess.DEVNULL)
        while driver.poll() is None:
            time.sleep(draw.uniform(0.02, 0.3))
            at_work = cluster.workers("Map(")
            if at_work and killed < times:
                with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                    draw.choice(at_work).kill()
                    killed += 1
        assert driver.returncode == 0
        assert hashes_of(root) == undisturbed[1]
        storage.remove_directory(str(root))


def test_killed_drivers_change_nothing(cluster, images, undisturbed, tmp_path):
    kill_drivers(cluster, images, undisturbed, tmp_path / "data", times=1, seed=0)


def test_killed_workers_change_nothing(cluster, images, undisturbed, tmp_path):
    kill_workers(cluster, images, undisturbed, tmp_path / "data", times=2, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("where", ["disk", "s3"])
def test_ten_killed_drivers_and_ten_killed_workers_change_nothing(
    cluster, images, undisturbed, tmp_path, bucket, where
):
    base = str(tmp_path) if where == "disk" else bucket
    kill_drivers(cluster, images, undisturbed, f"{base}/data", times=10, seed=1)
    kill_workers(cluster, images, undisturbed, f"{base}/again", times=10, seed=1)


def test_poison_is_found_and_the_rest_is_kept(cluster, images, undisturbed, tmp_path):
    """Two images kill whoever looks at them: the job ends, without them, and says so."""
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    for what in ("header", "pixels"):
        info = PngImagePlugin.PngInfo()
        info.add_text("poison", what)
        Image.effect_noise((120, 100), 60).convert("RGB").save(folder / f"{what}.png", pnginfo=info)
    shard(cluster, folder, tmp_path / "data")
    version = open_version(str(tmp_path / "data"))
    crashed = {row["source"]: row for row in version.rows() if row["reason"] == "decoder_crashed"}
    assert set(crashed) == {"header.png", "pixels.png"}
    assert crashed["pixels.png"]["detail"] == "the decoder ended with SIGSEGV"
    good = open_version(str(undisturbed[0]))
    assert version.books["kept"] + version.books["repaired"] == good.books["kept"] + good.books["repaired"]
    assert set(version.samples()["key"].to_pylist()) == set(good.samples()["key"].to_pylist())


def test_too_many_refusals_stop_the_job(cluster, tmp_path):
    """What headers and what pixels refuse is counted together, and again by whoever asks again."""
    folder = tmp_path / "images"
    generate_photos(folder, 6, seed=0, size=144)
    for number, path in enumerate(sorted(folder.iterdir())[:4]):
        path.write_bytes(f"text {number}".encode() if number < 2 else path.read_bytes()[:-2000])
    for _ in range(2):
        done = shard(cluster, folder, tmp_path / "data", "--budget.at-least", 3, code=1)
        assert "4 of 6 images were refused, 3 are allowed; among them: " in done.stderr
        assert "(truncated)" in done.stderr
        assert not (tmp_path / "data" / "LATEST").exists()


def test_a_status_line_says_rates_and_books(undisturbed):
    log = undisturbed[3]
    line = r"shard \d+/\d+ \| 100 % \| [\d.]+ images/s \| [\d.]+ MB/s \| 1 quarantined \| took"
    assert re.search(line, log), log
    assert len(log.splitlines()) < 80  # Ray's own bars and logs are quiet


def test_an_s3_server_gives_the_same_bytes(cluster, s3, images, undisturbed, bucket):
    """Raw images from a bucket, shards to a bucket, while every request is refused the first time."""
    for path in images.rglob("*"):
        if path.is_file():
            storage.publish_file(path, storage.join(bucket, "raw", path.relative_to(images).as_posix()))
    s3.mode = "busy"
    try:
        shard(cluster, f"{bucket}/raw", f"{bucket}/data")
    finally:
        s3.mode = "up"
    ours = hashes_of(f"{bucket}/data")
    same = {path: value for path, value in undisturbed[1].items() if not path.startswith("builds/")}
    assert {path: value for path, value in ours.items() if not path.startswith("builds/")} == same


@pytest.mark.slow
def test_a_server_that_dies_leaves_nothing_half_published(cluster, s3, images, undisturbed, bucket):
    """It dies when some shards are there, and comes back; the same command then makes the same bytes."""
    root = f"{bucket}/data"
    for shards in (1, 4):
        driver = subprocess.Popen(
            command(images, root), env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while len(list(storage.walk(f"{root}/shards"))) < shards:
            time.sleep(0.05)
        s3.stop()
        out, err = driver.communicate(timeout=200)
        s3.start()
        assert driver.returncode == 1, out + err
        assert "Traceback" not in out + err
        assert "no answer in 4 s" in err
        assert "the same command goes on" in err
        assert not storage.exists(f"{root}/LATEST")
        assert not storage.list_files(f"{root}/versions")
        for entry in storage.walk(f"{root}/shards"):
            digest = hashlib.sha256(storage.read_bytes(entry.uri)).hexdigest()
            assert entry.path == f"{digest[:16]}.tar"  # whole, or not there
    shard(cluster, images, root)
    assert hashes_of(root) == undisturbed[1]


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the folder of real images is not here")
def test_no_real_image_is_lost(cluster, tmp_path):
    """All real photographs, paintings and broken files: every one in the books, only broken ones refused."""
    done = subprocess.run(
        [
            *(sys.executable, str(REPO / "pipelines" / "shard.py"), "--output", str(tmp_path / "data")),
            *("--source", str(DATA / "photos"), str(DATA / "paintings"), str(DATA / "broken")),
            *("--shard.min-side", "200", "--shard.target-mb", "16"),
        ],
        env=cluster.environment,
        check=False,
    )
    assert done.returncode == 0
    version = open_version(str(tmp_path / "data"))
    assert version.books["found"] == sum(len(list((DATA / d).iterdir())) for d in ("photos", "paintings", "broken"))
    refused = {row["source"] for row in version.rows() if row["state"] == "quarantined"}
    assert refused < {path.name for path in (DATA / "broken").iterdir()}
    assert (
        version.books["kept"] + version.books["repaired"] + version.books["quarantined"] + version.books["duplicate"]
        == version.books["found"]
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_peak_memory_does_not_grow_with_the_images(cluster, tmp_path):
    """Ten thousand images against one thousand, in the driver and in the hungriest worker."""
    peaks = {}
    for count in (1_000, 10_000):
        folder = tmp_path / f"raw-{count}"
        folder.mkdir()
        draw = np.random.default_rng(count)
        for number in range(count):
            pixels = draw.integers(0, 256, (8, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((100, 80)).save(folder / f"{number:05d}.jpg")
        root = tmp_path / f"data-{count}"
        shard(cluster, folder, root, "--shard.target-mb", 1)
        result = json.loads((root / "result.json").read_text())
        assert result["books"]["found"] == count
        peaks[count] = result["peak_memory"]
    print(peaks)
    assert peaks[10_000]["driver_mb"] < peaks[1_000]["driver_mb"] + 40
    assert peaks[10_000]["worker_mb"] < peaks[1_000]["worker_mb"] + 40
