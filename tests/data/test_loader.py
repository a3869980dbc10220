"""Batches are what the pure order says, whoever reads them."""

import gc
import io
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from adaconv.data import loader
from adaconv.data.loader import Geometry, PairDataset, SampleReader, decode_crop, is_lost_worker, make_loader
from adaconv.data.manifest import open_version
from adaconv.data.shard_cache import ShardCache
from adaconv.errors import DatasetError

GEOMETRY = Geometry(resize=48, crop=32, flip=True)


def pairs(content, style, **options):
    options = {"seed": 1, "global_batch_size": 6, "content_geometry": GEOMETRY, "style_geometry": GEOMETRY} | options
    return PairDataset(content, style, **options)


def same(a, b):
    return torch.equal(a.content, b.content) and torch.equal(a.style, b.style) and a.content_keys == b.content_keys


def jpeg(size=(200, 120), **options):
    y, x = np.mgrid[: size[1], : size[0]]
    pixels = np.stack([x % 256, y % 256, (x + y) % 256], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0, **options)
    return buffer.getvalue()


def grey_jpeg():
    buffer = io.BytesIO()
    Image.fromarray(np.arange(200 * 130, dtype=np.uint32).reshape(130, 200).astype(np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(("side", "sizes"), [(224, (463, 464)), (448, (450, 457)), (112, (461, 464))])
def test_a_crop_of_the_whole_side_stays_within_it(side, sizes):
    """side * (short / side) may lie a rounding above the shorter side."""
    for short in sizes:
        for size in ((short, short + 100), (short + 100, short), (short, short)):
            picture = io.BytesIO()
            Image.new("RGB", size, (9, 99, 199)).save(picture, "JPEG")
            crop = decode_crop(picture.getvalue(), Geometry(side, side, flip=False), random.Random(0))
            assert crop.shape == (side, side, 3)


def test_a_sample_that_no_crop_can_be_taken_of_is_named(content_version, style_version, monkeypatch):
    def refuse(*_):
        raise ValueError("box offset can't be negative")

    monkeypatch.setattr(loader, "decode_crop", refuse)
    with pytest.raises(DatasetError, match=r"content sample [0-9a-f]{32} cannot be decoded: box offset"):
        pairs(content_version, style_version)[0]


def test_a_batch_has_the_stated_shape(content_version, style_version):
    batch = pairs(content_version, style_version)[3]
    assert batch.content.shape == batch.style.shape == (6, 3, 32, 32)
    assert batch.content.dtype == torch.uint8
    assert len(set(batch.content_keys)) == 6


def test_skipped_batches_are_left_out_and_no_other_one_changes(content_version, style_version):
    whole, less = (pairs(content_version, style_version, skipped=skipped) for skipped in ((), ((1, 3),)))
    assert [less[step].step for step in (0, 1, 2)] == [0, 1, 2]
    assert all(same(less[step], whole[batch]) for step, batch in ((0, 0), (1, 3), (2, 4)))
    assert less.shards_of(1) == whole.shards_of(3)


@pytest.mark.parametrize(("num_ranks", "share"), [(1, 1200), (2, 600), (4, 600)])
def test_a_rank_has_the_share_of_the_cache_of_the_partitions_that_it_reads(
    content_version, style_version, tmp_path, num_ranks, share
):
    cache = ShardCache(tmp_path, 1200)
    ours = pairs(content_version, style_version, num_ranks=num_ranks, partitions=2, cache=cache)
    assert ours.cache_share == share


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_ranks_share_one_global_batch(content_version, style_version, num_ranks):
    whole = pairs(content_version, style_version)[5]
    shares = [pairs(content_version, style_version, rank=r, num_ranks=num_ranks)[5] for r in range(num_ranks)]
    assert torch.equal(torch.cat([share.content for share in shares]), whole.content)
    assert torch.equal(torch.cat([share.style for share in shares]), whole.style)
    assert [key for share in shares for key in share.style_keys] == whole.style_keys


def test_a_loader_that_starts_later_gives_the_same(content_version, style_version):
    dataset = pairs(content_version, style_version)
    options = {"steps": 6, "prefetch_batches": 2, "pin_memory": False}
    whole = list(make_loader(dataset, first_step=0, workers=0, **options))
    late = list(make_loader(dataset, first_step=4, workers=2, **options))
    assert [b.step for b in late] == [4, 5]
    assert same(whole[4], late[0])
    assert same(whole[5], late[1])


READS_UNTIL_IT_IS_KILLED = """
import os, pickle, signal, sys
from pathlib import Path
import psutil
from adaconv.data.loader import make_loader
if __name__ == "__main__":
    dataset = pickle.loads(Path(sys.argv[1]).read_bytes())
    batches = make_loader(dataset, first_step=0, steps=9999, workers=2, prefetch_batches=2, pin_memory=False)
    next(batches)
    print(*(process.pid for process in psutil.Process().children(recursive=True)), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_rank_that_is_killed_leaves_no_workers(content_version, style_version, tmp_path):
    dataset = pairs(content_version, style_version)
    (tmp_path / "dataset").write_bytes(pickle.dumps(dataset))
    (tmp_path / "rank.py").write_text(READS_UNTIL_IT_IS_KILLED)
    done = subprocess.run(
        [sys.executable, tmp_path / "rank.py", tmp_path / "dataset"],
        env={**os.environ, "PYTHONPATH": str(Path(loader.__file__).parents[2])},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 4  # two workers, what they are forked from, and multiprocessing's resource tracker
    deadline = time.monotonic() + 30
    while left := [pid for pid in pids if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_a_sample_is_cropped_anew_each_time(content_version, style_version):
    dataset = pairs(content_version, style_version, global_batch_size=24)
    first, second = dataset[0], dataset[1]  # two epochs over 24 photos
    assert sorted(first.content_keys) == sorted(second.content_keys)
    key = first.content_keys[0]
    crops = [b.content[b.content_keys.index(key)] for b in (first, second)]
    assert not torch.equal(*crops)


def test_a_crop_is_that_of_the_scaled_image():
    """Cropping before resampling changes nothing but rounding at the edges."""
    data = jpeg()
    draw = random.Random(3)
    across, down, mirrored = draw.random(), draw.random(), draw.random() < 0.5
    ours = decode_crop(data, Geometry(resize=60, crop=40, flip=False), random.Random(3)).astype(int)
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (100, 60))
        whole = image.convert("RGB").resize((100, 60), Image.Resampling.BICUBIC)
    left, top = across * 60, down * 20
    wanted = np.asarray(whole.crop((round(left), round(top), round(left) + 40, round(top) + 40))).astype(int)
    assert np.abs(ours - wanted).mean() < 6
    flipped = decode_crop(data, Geometry(resize=60, crop=40, flip=True), random.Random(3))
    assert np.array_equal(flipped, ours[:, ::-1] if mirrored else ours)


def test_a_large_jpeg_is_decoded_at_a_fraction(monkeypatch):
    decoded = []
    plain = JpegImageFile.draft

    def draft(self, mode, size):
        answer = plain(self, mode, size)
        decoded.append(self.size)
        return answer

    monkeypatch.setattr(JpegImageFile, "draft", draft)
    decode_crop(jpeg(size=(800, 480)), Geometry(resize=60, crop=40, flip=False), random.Random(0))
    assert decoded == [(100, 60)]


def test_rotation_turns_by_quarters():
    data = jpeg()
    turned = {
        decode_crop(data, Geometry(120, 120, flip=False, rotate=True), random.Random(seed)).tobytes()
        for seed in range(40)
    }
    assert len(turned) > 4


def test_a_reader_is_handed_on_without_its_tables(content_version, monkeypatch):
    """Fifty bytes a sample: a node of 128 workers over 10^6 and 10^6 samples had 256 million of them."""
    count = 20_000
    keys = [f"{number:032x}" for number in range(count)]
    whole = {"key": keys} | {name: range(count) for name in ("offset", "size", "span", "crc32")}
    monkeypatch.setattr(type(content_version), "samples", lambda version, columns: pa.table(whole).select(columns))
    handed = pickle.dumps(SampleReader(content_version))
    assert len(handed) < count
    reader = SampleReader(content_version)
    handed = pickle.dumps(reader)
    tracemalloc.start()
    other = pickle.loads(handed)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 10 * count  # what other threads of this process allocate meanwhile is in it
    assert (len(other), other.key(count - 1)) == (len(reader), reader.key(count - 1)) == (count, keys[-1])


def test_the_tables_of_a_reader_lie_in_files_for_as_long_as_it_is_there(content_version, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    reader = SampleReader(content_version)
    told = [(reader.key(row), reader.read(row)) for row in range(len(reader))]
    assert not list(tmp_path.iterdir())  # one that is handed to nobody needs none
    other = pickle.loads(pickle.dumps(reader))
    assert pickle.dumps(other) == pickle.dumps(reader)
    for one in (other, reader):
        assert [(one.key(row), one.read(row)) for row in range(len(one))] == told
    assert len(list(tmp_path.glob("adaconv-samples-*/*.npy"))) == 3
    del reader, one
    gc.collect()
    assert not list(tmp_path.iterdir())
    assert other.key(0) == told[0][0]  # what is mapped stays


@pytest.mark.parametrize(
    "make",
    [
        lambda: jpeg(),
        lambda: jpeg(size=(800, 480)),
        lambda: jpeg(size=(97, 211), progressive=True),
        lambda: jpeg() + b"trailing",
        grey_jpeg,
    ],
)
@pytest.mark.parametrize("geometry", [Geometry(120, 96, flip=True), Geometry(60, 40, flip=False), GEOMETRY])
def test_both_decoders_give_the_same_pixels(make, geometry, monkeypatch):
    data = make()
    fast = decode_crop(data, geometry, random.Random(5))
    monkeypatch.setattr(loader, "simplejpeg", None)
    assert np.array_equal(fast, decode_crop(data, geometry, random.Random(5)))


def test_a_crop_from_its_own_pixels_is_that_from_the_whole_image():
    """The margin around it holds all that the filter reaches; Pillow rounds the places of a box to float32."""
    with Image.open(io.BytesIO(jpeg(size=(611, 433)))) as image:
        whole = np.asarray(image.convert("RGB"))
    draw = random.Random(0)
    for resize, crop in ((100, 64), (433, 200), (500, 256)):
        side = crop * 433 / resize
        for _ in range(20):
            left, top = draw.random() * (611 - side), draw.random() * (433 - side)
            wanted = Image.fromarray(whole).resize(
                (crop, crop), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
            )
            ours = loader._resample(whole, left, top, side, crop)
            assert np.abs(ours.astype(int) - np.asarray(wanted)).max() <= 1


def test_a_flipped_byte_is_found_where_samples_are_verified(content_version, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(content_version.root, root)
    version = open_version(str(root))
    row = version.samples().slice(0, 1).to_pylist()[0]
    with open(version.shard_uri(row["shard"]), "rb+") as tar:
        tar.seek(row["offset"] + row["size"] // 2)
        byte = tar.read(1)[0]
        tar.seek(-1, 1)
        tar.write(bytes([byte ^ 1]))
    SampleReader(version).read(0)
    assert SampleReader(version, verify=True).read(1) == SampleReader(content_version).read(1)
    with pytest.raises(DatasetError, match=rf"{row['shard']}: the bytes of sample {row['key']}"):
        SampleReader(version, verify=True).read(0)


def test_a_shard_that_is_cut_is_named(content_version, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(content_version.root, root)
    version = open_version(str(root))
    reader = SampleReader(version)
    with open(version.shard_uri(version.shards[0].name), "rb+") as tar:
        tar.truncate(1000)
    with pytest.raises(DatasetError, match=rf"{version.shards[0].name}: expected \d+ bytes of sample {reader.key(0)}"):
        reader.read(0)


def test_a_damaged_image_is_named(content_version, style_version, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(content_version.root, root)
    version = open_version(str(root))
    for shard in version.shards:
        path = version.shard_uri(shard.name)
        with open(path, "rb") as tar:
            damaged = tar.read().replace(b"\xff\xd8\xff", b"\x00\x00\x00")
        with open(path, "wb") as tar:
            tar.write(damaged)
    dataset = pairs(version, style_version)
    for workers in (0, 1):
        batches = make_loader(dataset, first_step=0, steps=1, workers=workers, prefetch_batches=1, pin_memory=False)
        with pytest.raises(DatasetError, match=r"^content sample [0-9a-f]{32} cannot be decoded: .*$") as raised:
            next(batches)
        assert "Traceback" not in str(raised.value)


@pytest.mark.parametrize(
    "error",
    [ConnectionError("s3://data/0.tar: no answer"), OSError(28, "No space left on device", "/tmp/adaconv-shards")],
)
def test_a_store_that_is_away_or_a_full_cache_is_no_damaged_image(content_version, style_version, monkeypatch, error):
    def away(self, row):
        raise error

    monkeypatch.setattr(SampleReader, "read", away)
    with pytest.raises(type(error)) as raised:
        pairs(content_version, style_version)[0]
    assert raised.value is error


def test_a_disk_that_fails_is_named(content_version, monkeypatch):
    def fails(*_):
        raise OSError(5, "Input/output error")

    reader = SampleReader(content_version)
    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(OSError, match="Input/output error") as raised:
        reader.read(0)
    assert raised.value.filename == content_version.shard_uri(content_version.shards[0].name)


def test_a_worker_that_hangs_or_dies_is_told_from_one_with_an_error(content_version, style_version, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(content_version.root, root)
    version = open_version(str(root))
    for shard in version.shards:
        path = version.shard_uri(shard.name)
        os.unlink(path)
        os.mkfifo(path)  # whoever opens it waits for a writer
    options = {"first_step": 0, "steps": 9, "workers": 1, "prefetch_batches": 1, "pin_memory": False}
    batches = make_loader(pairs(version, style_version), timeout_seconds=5, **options)
    with pytest.raises(RuntimeError, match="timed out") as hanging:
        next(batches)
    assert is_lost_worker(hanging.value)
    first, *stack = str(hanging.value).splitlines()
    told = re.fullmatch(
        r"DataLoader timed .*; worker 0 \(pid (\d+)\) was at content sample [0-9a-f]{32} of (.*), in", first
    )
    assert told, first
    assert told[2] in {version.shard_uri(shard.name) for shard in version.shards}
    assert re.fullmatch(r'  File ".*loader.py", line \d+ in _read_at', stack[0])
    os.kill(int(told[1]), signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"exited unexpectedly|killed by signal") as dead:
        next(batches)
    assert is_lost_worker(dead.value)
    assert not is_lost_worker(RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback"))


def test_memory_does_not_grow_with_epochs(content_version, style_version):
    dataset = pairs(content_version, style_version)
    steps_of_an_epoch = len(SampleReader(content_version)) // 6
    process, used = psutil.Process(), []
    for epoch in range(40):
        for step in range(epoch * steps_of_an_epoch, (epoch + 1) * steps_of_an_epoch):
            dataset[step]
        used.append(process.memory_info().rss)
    assert used[-1] - used[10] < 4 * 2**20  # a batch has 37 kB: 30 epochs of leaked ones would be as much
    assert len(process.open_files()) < 50
