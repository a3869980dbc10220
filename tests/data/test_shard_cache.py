"""Shards of a real S3 server in a folder with a limit: whole, verified, shared, and no more than fit."""

import os
import random
import threading
import time
from dataclasses import replace

import boto3
import pytest
import torch

from adaconv import storage
from adaconv.data import shard_cache
from adaconv.data.changes import collect, find_garbage
from adaconv.data.loader import Geometry, PairDataset, SampleReader, make_loader, prefetching
from adaconv.data.manifest import open_version
from adaconv.data.shard_cache import ShardCache, ShardPrefetcher
from adaconv.errors import DatasetError, UsageError

GEOMETRY = Geometry(resize=48, crop=32, flip=True)


@pytest.fixture
def remote(bucket, content_version):
    """The content dataset on S3."""
    root = f"{bucket}/photos"
    for entry in storage.walk(content_version.root):
        storage.publish_bytes(storage.join(root, entry.path), storage.read_bytes(entry.uri))
    return open_version(root)


def cached(folder):
    return {path.name for path in folder.iterdir() if path.suffix == ".tar"}


def total(folder):
    return sum(path.stat().st_size for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_samples_of_s3_are_those_of_the_disk_within_the_limit(remote, content_version, tmp_path):
    limit = 2 * max(shard.bytes for shard in remote.shards)
    here, there = SampleReader(content_version), SampleReader(remote, cache=ShardCache(str(tmp_path), limit))
    rows = list(range(len(here))) * 2
    random.Random(0).shuffle(rows)
    for row in rows:
        assert there.read(row) == here.read(row)
        assert total(tmp_path) <= limit
    assert not [path for path in tmp_path.iterdir() if ".tmp-" in path.name]


def test_the_least_recently_read_makes_room(remote, tmp_path):
    shards = remote.shards[:3]
    cache = ShardCache(str(tmp_path), sum(shard.bytes for shard in shards))
    for age, shard in zip((300, 100, 200), shards, strict=True):
        path = cache.path(remote.shard_uri(shard.name), shard)
        os.utime(path, (time.time() - age,) * 2)
    cache.path(remote.shard_uri(shards[0].name), shards[0])  # read again: now the newest
    fourth = remote.shards[3]
    cache.path(remote.shard_uri(fourth.name), fourth)
    assert shards[0].name in cached(tmp_path)
    assert shards[2].name not in cached(tmp_path)


def test_a_damaged_shard_is_refused_by_name(remote, tmp_path):
    shard = remote.shards[0]
    uri = remote.shard_uri(shard.name)
    data = bytearray(storage.read_bytes(uri))
    data[600] ^= 1
    storage.publish_bytes(uri, bytes(data))
    with pytest.raises(DatasetError, match=rf"{uri}: expected a file of sha256 {shard.sha256}.*twice"):
        ShardCache(str(tmp_path), 10**9).path(uri, shard)
    assert not cached(tmp_path)


def test_a_shard_larger_than_the_cache_is_refused(remote, tmp_path):
    shard = remote.shards[0]
    with pytest.raises(UsageError, match=r"data\.cache_gb: shard .* raise it"):
        ShardCache(str(tmp_path), shard.bytes - 1).path(remote.shard_uri(shard.name), shard)


def test_what_a_killed_process_left_is_removed(remote, tmp_path):
    shard = remote.shards[0]
    left = tmp_path / f".{'0' * 16}.tar.tmp-1-1"
    others = [tmp_path / name for name in ("thesis.tar", "notes.tmp-old", ".notes.tmp-1-1", "0123456789abcdef.tar.gz")]
    for file in (left, *others):
        file.write_bytes(b"x" * 100)
        os.utime(file, (0, 0))
    ShardCache(str(tmp_path), shard.bytes).path(remote.shard_uri(shard.name), shard)
    assert not left.exists()
    assert all(file.exists() for file in others)  # the folder may be one of the user's


def test_a_shard_is_fetched_once_however_many_ask(remote, tmp_path, monkeypatch):
    fetched = []
    plain = storage.read_range

    def read_range(uri, offset, size):
        fetched.append(uri)
        return plain(uri, offset, size)

    monkeypatch.setattr(storage, "read_range", read_range)
    cache, shard = ShardCache(str(tmp_path), 10**9), remote.shards[0]
    uri = remote.shard_uri(shard.name)
    threads = [threading.Thread(target=cache.path, args=(uri, shard)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == [uri]


@pytest.mark.parametrize(("ahead", "limited"), [(3, False), (9, True)])
def test_coming_shards_are_fetched_ahead_and_no_more_than_asked(remote, tmp_path, monkeypatch, ahead, limited):
    """By their number or their bytes; the first cannot be had at first."""
    shards = [(remote.shard_uri(shard.name), shard) for shard in remote.shards]
    away = [ConnectionError("no answer")]
    fetch = ShardCache.path

    def fetch_when_back(*given):
        if away:
            raise away.pop()
        return fetch(*given)

    monkeypatch.setattr(shard_cache, "_AGAIN_SECONDS", 0.1)
    monkeypatch.setattr(ShardCache, "path", fetch_when_back)
    cache = ShardCache(str(tmp_path), 10**9)
    most = [sum(shard.bytes for _, shard in shards[first : first + 3]) for first in (0, 1)]
    prefetcher = ShardPrefetcher(
        lambda step: [shards[step // 10 % len(shards)]], cache, ahead=ahead, limit_bytes=max(most) if limited else 10**9
    )

    def wait_for(count):
        deadline = time.monotonic() + 20
        while len(cached(tmp_path)) < count and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        return cached(tmp_path)

    prefetcher.follow(0)
    assert wait_for(3) == {shard.name for _, shard in shards[:3]}
    prefetcher.follow(10)
    assert wait_for(4) == {shard.name for _, shard in shards[:4]}
    prefetcher.close()


def test_uploads_that_never_ended_are_collected(remote):
    client = boto3.client("s3")
    bucket = remote.root.split("/")[2]
    for key in ("photos/shards/begun.tar", "other/begun.tar"):
        upload = client.create_multipart_upload(Bucket=bucket, Key=key)
        part = {"Bucket": bucket, "Key": key, "UploadId": upload["UploadId"], "PartNumber": 1}
        client.upload_part(**part, Body=b"x" * 100)
    garbage = find_garbage(remote.root, keep_last=None, older_than_hours=1)  # this server dates every upload 2010
    assert [entry.path for entry in garbage.uploads] == ["shards/begun.tar"]
    collect(replace(garbage, files=()))
    left = client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    assert [upload["Key"] for upload in left] == ["other/begun.tar"]


def test_a_loader_over_s3_gives_the_batches_of_the_disk(remote, content_version, tmp_path):
    options = {"seed": 1, "global_batch_size": 6, "content_geometry": GEOMETRY, "style_geometry": GEOMETRY}
    here = PairDataset(content_version, content_version, **options)
    there = PairDataset(remote, remote, cache=ShardCache(str(tmp_path), 10**9), **options)
    with prefetching(there, ahead=4) as prefetcher:
        prefetcher.follow(2)
        batches = make_loader(there, first_step=2, steps=6, workers=1, prefetch_batches=1, pin_memory=False)
        for step, batch in enumerate(batches, start=2):
            assert batch.content_keys == here[step].content_keys
            assert torch.equal(batch.content, here[step].content)
            prefetcher.follow(step)
