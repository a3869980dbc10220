"""The same promises on a local disk and on an S3 server on loopback."""

import os
from pathlib import Path

import pytest

from adaconv import storage


@pytest.fixture(scope="module")
def s3_server():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path, monkeypatch):
    if request.param == "local":
        yield str(tmp_path)
        return
    endpoint = request.getfixturevalue("s3_server")
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    storage._local.__dict__.clear()
    import boto3

    bucket = f"b{abs(hash(request.node.name))}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    yield f"s3://{bucket}/prefix"
    storage._local.__dict__.clear()


def test_bytes_come_back_whole_and_in_ranges(root):
    uri = storage.join(root, "a", "b.bin")
    assert not storage.exists(uri)
    storage.publish_bytes(uri, b"0123456789")
    assert storage.exists(uri)
    assert storage.size_of(uri) == 10
    assert storage.read_bytes(uri) == b"0123456789"
    assert storage.read_range(uri, 3, 4) == b"3456"
    storage.publish_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"new"
    storage.remove(uri)
    storage.remove(uri)
    assert not storage.exists(uri)


def test_a_missing_file_is_a_missing_file(root):
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "nothing"))


def test_listings_are_sorted_and_by_kind(root):
    assert storage.list_files(root) == []
    for name in ("b", "a", ".hidden"):
        storage.publish_bytes(storage.join(root, name), b"x")
    storage.publish_bytes(storage.join(root, "folder", "c"), b"x")
    assert [storage.name_of(uri) for uri in storage.list_files(root)] == ["a", "b"]
    assert storage.list_directories(root) == [storage.join(root, "folder")]
    assert storage.read_bytes(storage.list_files(root)[0]) == b"x"


def test_a_folder_is_published_with_its_mark_last_and_replaces_an_older_one(root, tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    target = storage.join(root, "run", "step")
    for names in (("a", "b", "meta"), ("c", "meta")):
        for old in source.iterdir():
            old.unlink()
        for name in names:
            (source / name).write_text(name)
        storage.publish_directory(source, target, last="meta")
        assert [storage.name_of(uri) for uri in storage.list_files(target)] == sorted(names)
    local = storage.local_directory(target)
    assert (local / "c").read_text() == "c"
    storage.remove_directory(target, first="meta")
    assert storage.list_files(target) == []


def test_a_cached_copy_is_fetched_once(root, tmp_path):
    uri = storage.join(root, "x.tar")
    storage.publish_bytes(uri, b"tar")
    copy = storage.local_copy(uri, cache_dir=str(tmp_path / "cache"))
    assert copy.read_bytes() == b"tar"
    if not storage.is_local(root):
        storage.remove(uri)
        assert storage.local_copy(uri, cache_dir=str(tmp_path / "cache")).read_bytes() == b"tar"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "file"
    storage.publish_bytes(str(target), b"old")

    def no_space(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        storage.publish_bytes(str(target), b"new")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_paths_become_absolute_and_uris_stay(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs") == str(tmp_path / "runs")
    assert storage.absolute("~/runs") == str(Path.home() / "runs")
    assert storage.absolute("s3://b/runs/") == "s3://b/runs"
    assert storage.join("s3://b/p/", "x", "y") == "s3://b/p/x/y"
