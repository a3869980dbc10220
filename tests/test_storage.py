"""The same promises on a local disk and on an S3 server on loopback."""

import os
import pickle
import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import Mock

import boto3
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import ClientError

from adaconv import storage
from adaconv.data import shard_cache
from adaconv.data.builds import spill_listing
from adaconv.data.manifest import publish_version
from adaconv.data.sources import Found, iter_images, read_found
from adaconv.errors import CredentialsError, UsageError, of_storage
from adaconv.images import ImageError
from adaconv.orchestration.shard_job import publish_note


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("bucket")


@pytest.fixture
def bucket(bucket):
    return f"{bucket}/prefix"


def test_bytes_come_back_whole_and_in_ranges(root):
    uri = storage.join(root, "a", "b.bin")
    assert not storage.exists(uri)
    storage.publish_bytes(uri, b"0123456789")
    assert storage.exists(uri)
    assert storage.size_of(uri) == 10
    assert storage.read_bytes(uri) == b"0123456789"
    assert storage.read_range(uri, 3, 4) == b"3456"
    assert storage.read_range(uri, 8, 4) == b"89"
    assert storage.read_range(uri, 50, 4) == b""
    storage.publish_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"new"
    storage.remove(uri)
    storage.remove(uri)
    assert not storage.exists(uri)


def test_of_several_that_publish_what_is_absent_one_is_kept(root, monkeypatch):
    uri = storage.join(root, "id")
    with monkeypatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setattr(storage, "exists", lambda _: False)  # as all of them find who look at once
        wait = threading.Barrier(4).wait
        list(pool.map(lambda number: (wait(), storage.publish_if_absent(uri, bytes([number]))), range(4)))
    first = storage.read_bytes(uri)
    storage.publish_if_absent(uri, b"another")
    assert storage.read_bytes(uri) == first
    assert storage.list_files(root) == [uri]
    if storage.is_local(root):
        assert [path.name for path in Path(root).iterdir()] == ["id"]


def test_what_is_absent_is_published_where_nothing_tells_that_it_is(root, request, monkeypatch):
    """A file system without hard links, and a store without conditional writes."""
    if storage.is_local(root):
        monkeypatch.setattr(os, "link", Mock(side_effect=PermissionError(1, "Operation not permitted")))
    else:
        monkeypatch.setattr(request.getfixturevalue("s3"), "mode", "plain")
    uri = storage.join(root, "id")
    for data in (b"one", b"two"):
        storage.publish_if_absent(uri, data)
    assert storage.read_bytes(uri) == b"one"


def test_threads_share_a_client_and_a_fork_has_its_own(bucket):
    """Though all of them ask for it at once, it is made once; a lock that was held when a process forked holds none."""
    uri = f"{bucket}/a"
    with ThreadPoolExecutor(8) as pool:
        begun = threading.Barrier(8)
        clients = set(pool.map(lambda _: (begun.wait(), id(storage._filesystem(uri)))[1], range(8)))
        assert len(clients) == 1
        for number in range(8):
            storage.publish_bytes(f"{uri}{number}", bytes([number]))
        assert list(pool.map(lambda number: storage.read_bytes(f"{uri}{number % 8}")[0], range(64))) == 8 * [*range(8)]
    with storage._making:
        child = get_context("fork").Process(target=_read, args=(f"{uri}3",), daemon=True)
        child.start()
    child.join(60)
    assert child.exitcode == 3


def _read(uri):
    os._exit(storage.read_bytes(uri)[0])


def test_a_missing_file_is_a_missing_file(root):
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "nothing"))


@pytest.mark.parametrize("uri", ["gs://bucket/a", "file:///etc/hostname", "foo://a"])
def test_other_storage_is_refused(uri):
    with pytest.raises(UsageError, match="expected a local path or s3://"):
        storage.read_bytes(uri)


def test_a_link_to_itself_is_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "circle.jpg").symlink_to(tmp_path / "circle.jpg")
    assert [entry.path for entry in storage.walk(str(tmp_path))] == ["circle.jpg"]


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
    with storage.local_directory(target) as local:
        assert (local / "c").read_text() == "c"
    assert local.exists() == storage.is_local(target)
    storage.remove_directory(target, first="meta")
    assert storage.list_files(target) == []


def test_what_a_killed_process_was_publishing_is_swept_by_the_next_one(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "run"
    for place in (source, folder / ".step-1.tmp-0123abcd", folder / ".step-1.tmp-4567abcd", folder / ".mine"):
        place.mkdir(parents=True)
        (place / "meta").write_text("x")
    long_ago = time.time() - 7200
    os.utime(folder / ".step-1.tmp-0123abcd", (long_ago, long_ago))
    os.utime(folder / ".mine", (long_ago, long_ago))
    storage.publish_directory(source, str(folder / "step-2"), last="meta")
    assert sorted(path.name for path in folder.iterdir()) == [".mine", ".step-1.tmp-4567abcd", "step-2"]


def test_a_name_is_never_taken_for_a_pattern(root):
    for name in ("run[1]/a", "run1/a", "*/a", "other/a", "w?t/a", "wet/a"):
        storage.publish_bytes(storage.join(root, *name.split("/")), name.encode())
    for name in ("run[1]", "*", "w?t"):
        folder = storage.join(root, name)
        assert storage.is_directory(folder)
        assert [storage.read_bytes(uri) for uri in storage.list_files(folder)] == [f"{name}/a".encode()]
        storage.remove_directory(folder, first="a")
        storage.remove_directory(folder)
        assert not storage.exists(folder)
    assert sorted(entry.path for entry in storage.walk(root)) == ["other/a", "run1/a", "wet/a"]


def test_more_files_than_a_page_are_walked_and_removed(bucket):
    for number in range(1005):
        storage._filesystem(bucket).pipe_file(f"{bucket}/{number}", b"")
    assert {int(entry.path) for entry in storage.walk(bucket)} == set(range(1005))
    storage._filesystem(bucket).pipe_file(f"{bucket}/", b"")  # some clients keep a folder so
    storage.publish_bytes(f"{bucket}-beside/x", b"")
    storage.remove_directory(bucket)
    assert list(storage.walk(bucket, hidden=True)) == []
    assert not storage.exists(bucket)
    assert storage.exists(f"{bucket}-beside/x")


def test_files_are_removed_a_thousand_a_request(root, monkeypatch):
    wanted = [storage.join(root, f"a [{number}]?") for number in range(4)]
    for uri in wanted:
        storage.publish_bytes(uri, b"x")
    monkeypatch.setattr(storage, "_DELETED_AT_ONCE", 2)
    delete, sizes = storage._delete, []
    monkeypatch.setattr(storage, "_delete", lambda bucket, keys: sizes.append(len(keys)) or delete(bucket, keys))
    storage.remove_files([*wanted[:3], storage.join(root, "gone already")])
    assert storage.list_files(root) == [wanted[3]]
    assert sizes in ([], [2, 2])  # on a disk one by one


def test_a_file_is_read_at_any_place(root):
    uri, data = storage.join(root, "file"), bytes(range(256)) * 9000
    storage.publish_bytes(uri, data)
    with storage.open_binary(uri) as file:
        assert file.read(5) == data[:5]
        file.seek(-7, os.SEEK_END)
        assert file.read() == data[-7:]
        file.seek(1_000_003)
        assert file.read(1_200_000) == data[1_000_003:2_200_003]
        assert file.tell() == 2_200_003
        file.seek(3_000_000)
        assert file.read(1) == b""
    with pytest.raises(FileNotFoundError):
        storage.open_binary(storage.join(root, "nothing"))


def test_a_few_files_of_a_store_are_under_way_at_once_and_come_in_order():
    """A disk's are read one after another: it is as fast as whoever reads."""
    together, taken = threading.Barrier(4), []

    def items():
        for number in range(40):
            taken.append(number)
            yield number

    def call(number):
        if number < 4:
            together.wait(timeout=20)  # for three others: alone, it would wait in vain
        return number

    given = storage.few_at_once(call, items(), where="s3://bucket/work")
    assert next(given) == 0
    assert len(taken) < 20
    assert list(given) == list(range(1, 40))
    assert list(storage.few_at_once(str, [1, 2], where="/work")) == ["1", "2"]
    with pytest.raises(ZeroDivisionError):
        list(storage.few_at_once(lambda number: 1 // number, [1, 0, 2], where="s3://bucket/work"))


def test_what_is_no_file_is_not_walked(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "a.jpg").write_bytes(b"x")
    assert [entry.path for entry in storage.walk(str(tmp_path))] == ["a.jpg"]


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


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    target, source = str(tmp_path / "file"), tmp_path / "source"
    source.write_bytes(b"new")

    def no_space(*_):
        raise OSError(28, "No space left on device")

    def written(folder):
        with storage.file_for(folder) as path:
            places.append(str(path.parent))
            no_space()

    places: list[str] = []
    monkeypatch.setattr(os, "fsync", no_space)
    for write, where in (
        (lambda: storage.publish_bytes(target, b"new"), target),
        (lambda: storage.publish_file(source, target), target),
        (lambda: written(str(tmp_path)), str(tmp_path)),
        (lambda: written("s3://bucket/folder"), None),  # the temporary one, which is made anew each time
    ):
        with pytest.raises(OSError, match="No space") as caught:
            write()
        where = where or places[-1]
        assert of_storage(pickle.loads(pickle.dumps(caught.value))) == f"No space left on device: {where}"


def test_a_full_disk_is_named_wherever_scratch_is_written(tmp_path, monkeypatch, content_version):
    """Its folder is in TMPDIR, and there may be several disks to make room on."""

    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(pq.ParquetWriter, "write_table", no_space)
    monkeypatch.setattr(Path, "write_bytes", no_space)
    monkeypatch.setattr(shard_cache, "_download", no_space)
    cache, shard = shard_cache.ShardCache(str(tmp_path), 10**9), content_version.shards[0]
    rows = list(content_version.rows())
    made = {"recipe": {}, "shards": content_version.shards, "rows": rows, "after": None}
    for write in (
        lambda: spill_listing([Found("/a.jpg", "a.jpg")], tmp_path),
        lambda: publish_version(str(tmp_path), **made),
        lambda: publish_note(str(tmp_path), "a", shard, rows),
        lambda: cache.path("s3://bucket/a.tar", shard),
    ):
        with pytest.raises(OSError, match="No space") as caught:
            write()
        assert of_storage(caught.value).startswith(f"No space left on device: {tmp_path}")
        assert "None" not in str(caught.value)


def test_paths_become_absolute_and_uris_stay(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs") == str(tmp_path / "runs")
    assert storage.absolute("~/runs") == str(Path.home() / "runs")
    assert storage.absolute("s3://b/runs/") == "s3://b/runs"
    assert storage.join("s3://b/p/", "x", "y") == "s3://b/p/x/y"


def test_every_file_below_a_folder_is_walked(root):
    names = ["a.jpg", "b/c.jpg", "b/d/e é.jpg", "b/.hidden", ".folder/f.jpg"]
    for name in names:
        storage.publish_bytes(storage.join(root, name), name.encode())
    found = {entry.path: entry for entry in storage.walk(root)}
    assert sorted(found) == names[:3]
    assert sorted(entry.path for entry in storage.walk(root, hidden=True)) == sorted(names)
    assert storage.read_bytes(found["b/d/e é.jpg"].uri) == names[2].encode()
    assert found["b/c.jpg"].bytes == 7
    if storage.is_local(root):
        os.utime(Path(root) / "a.jpg", (1, 1))  # a file system's clock may stand still for milliseconds
        found = {entry.path: entry for entry in storage.walk(root)}
    storage.publish_bytes(storage.join(root, "a.jpg"), b"other")
    assert {entry.path: entry for entry in storage.walk(root)}["a.jpg"].stamp != found["a.jpg"].stamp
    assert list(storage.walk(storage.join(root, "nothing"))) == []


@pytest.mark.parametrize("hidden", [True, False])
def test_what_the_file_system_found_is_nobodys(tmp_path, hidden):
    """Only root may read it, so it ended a job of whoever named a disk."""
    (tmp_path / "lost+found").mkdir()
    for name in ("a.jpg", "lost+found/b.jpg"):
        (tmp_path / name).write_bytes(b"x")
    assert [entry.path for entry in storage.walk(str(tmp_path), hidden=hidden)] == ["a.jpg"]


def test_keys_that_were_not_deleted_are_tried_again_or_named(monkeypatch):
    """A request to delete many is answered with 200, and errors of single keys in it."""
    answers = [[{"Key": "p/a", "Code": "InternalError"}], [], [{"Key": "p/a", "Code": "AccessDenied"}]]

    def call_s3(what, **_):
        assert what in ("list_objects_v2", "delete_objects")
        return {"Contents": [{"Key": "p/a"}]} if what.startswith("list") else {"Errors": answers.pop(0)}

    monkeypatch.setattr(storage, "_filesystem", lambda uri: SimpleNamespace(call_s3=call_s3))
    storage.remove_directory("s3://b/p")
    with pytest.raises(PermissionError, match="s3://b/p/a was not deleted: AccessDenied"):
        storage.remove_directory("s3://b/p")


def test_a_server_that_is_busy_is_asked_again(bucket, s3):
    s3.mode = "busy"
    try:
        storage.publish_bytes(f"{bucket}/a", b"abc")
        assert storage.read_bytes(f"{bucket}/a") == b"abc"
        assert storage.exists(f"{bucket}/a")
        with storage.open_binary(f"{bucket}/a") as file:
            file.seek(1)
            assert file.read() == b"bc"
        storage.remove_directory(bucket)
        assert not storage.exists(bucket)
    finally:
        s3.mode = "up"


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidToken", "SignatureDoesNotMatch"])
def test_credentials_that_are_refused_are_no_fault_of_the_file(bucket, s3, code):
    """A session's token expires after some hours: what is read then is neither empty nor unreadable."""
    storage.publish_bytes(f"{bucket}/a.jpg", b"abc")
    (found,) = iter_images((bucket,))
    assert storage.read_range(found.uri, 500, 10) == b""
    s3.mode = code
    try:
        for call in (lambda uri: storage.read_range(uri, 0, 3), lambda uri: read_found(found)):
            with pytest.raises(CredentialsError, match=rf"prefix/a.jpg: S3 refuses the credentials \({code}.*renew"):
                call(found.uri)
        with pytest.raises(CredentialsError, match="renew"):
            storage.size_of(found.uri)
        s3.mode = "InvalidRequest"
        with pytest.raises(OSError, match="No, says the server"):
            storage.read_range(found.uri, 0, 3)
        s3.mode = "AccessDenied"
        with pytest.raises(ImageError, match="unreadable: no permission to read it"):
            read_found(found)
    finally:
        s3.mode = "up"


def test_a_server_that_is_gone_is_named_soon_and_one_that_comes_back_is_found(bucket, s3, monkeypatch):
    monkeypatch.setenv("ADACONV_STORAGE_PATIENCE", "1")
    storage.publish_bytes(f"{bucket}/a", b"kept")
    s3.stop()
    sleep, pauses = time.sleep, []
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: (pauses.append(seconds), sleep(seconds)))
    try:
        for call in (storage.read_bytes, storage.exists, lambda uri: storage.publish_bytes(uri, b"x")):
            pauses.clear()
            with pytest.raises(ConnectionError, match=r"prefix/a: no answer in 1 s.*AWS_ENDPOINT_URL"):
                call(f"{bucket}/a")
            assert 0 < sum(pauses) <= 0.1 * (2 + 4 + 8)  # before the second to the fourth attempt; more are beyond 1 s
    finally:
        s3.start()
    assert storage.read_bytes(f"{bucket}/a") == b"kept"


class _Mute(BaseHTTPRequestHandler):
    """Takes what is put, and answers a question for a file with nothing at all."""

    seen: ClassVar[list[tuple[str, str | None]]] = []

    def do_PUT(self):
        self.seen.append(("PUT", self.headers.get("Expect")))
        if self.path.endswith("/deaf"):
            time.sleep(5)
            self.close_connection = True
            return
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("ETag", '"x"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):
        self.seen.append(("GET", None))
        self.close_connection = True

    def do_HEAD(self):
        self.do_GET()

    def handle_expect_100(self):  # as a server that is stopped: it never says that it wants the body
        return False

    def log_message(self, *_):
        pass


@pytest.fixture
def mute(monkeypatch):
    _Mute.seen.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Mute) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "x")
        storage._clients.clear()
        yield _Mute.seen
        storage._clients.clear()
        server.shutdown()


def test_nobody_waits_to_be_asked_for_what_is_written(mute):
    """aiohttp waits without end for a server that was to say whether it wants the bytes."""
    storage.publish_bytes("s3://b/a", b"x" * 2000)
    assert mute == [("PUT", None)]


@pytest.mark.parametrize("how", ["bytes", "file"])
def test_who_takes_nothing_is_not_waited_for_without_end(mute, monkeypatch, tmp_path, how):
    monkeypatch.setenv("ADACONV_STORAGE_PATIENCE", "0.1")
    monkeypatch.setattr(storage, "_WRITE_SECONDS", 0.3)
    monkeypatch.setattr(storage, "_LEAST_BYTES_A_SECOND", 1e9)
    data = bytes(30_000_000)  # more than the system takes on its own
    (tmp_path / "file").write_bytes(data)
    write = partial(storage.publish_file, tmp_path / "file") if how == "file" else partial(_publish, data)
    with pytest.raises(ConnectionError, match="b/deaf: no answer in 0 s, 4 attempts"):
        write("s3://b/deaf")


def _publish(data, uri):
    storage.publish_bytes(uri, data)


def test_attempts_are_counted_once(mute, monkeypatch):
    """Not five of s3fs's own for each, twice over."""
    monkeypatch.setenv("ADACONV_STORAGE_PATIENCE", "0.1")
    with pytest.raises(ConnectionError, match="no answer in 0 s, 4 attempts"):
        storage.read_range("s3://b/a", 0, 3)
    assert len(mute) <= 8  # aiohttp asks once more where a connection was closed


def test_a_folder_is_known_by_its_first_file(bucket, monkeypatch):
    for number in range(5):
        storage.publish_bytes(f"{bucket}/folder/{number}", b"x")
    assert storage.is_directory(f"{bucket}/folder")
    assert storage.is_directory(bucket.removesuffix("/prefix"))
    assert not storage.is_directory(f"{bucket}/folder/1")
    assert not storage.is_directory(f"{bucket}/fold")
    assert not storage.is_directory("s3://no-such-bucket/folder")
    client, asked = storage._filesystem(bucket), []
    call = client.call_s3
    monkeypatch.setattr(client, "call_s3", lambda *a, **k: asked.append((a, k)) or call(*a, **k))
    assert storage.is_directory(f"{bucket}/folder")
    assert [options["MaxKeys"] for _, options in asked] == [1]


def test_a_large_file_whose_last_answer_was_lost_is_sent_again(monkeypatch):
    sent = []

    def put_file(path, uri, timeout):
        sent.append(uri)
        if len(sent) == 1:
            error = ClientError({"Error": {"Code": "NoSuchUpload"}}, "CompleteMultipartUpload")
            raise FileNotFoundError("The specified upload does not exist.") from error

    monkeypatch.setattr(storage, "_filesystem", lambda uri: SimpleNamespace(put_file=put_file))
    storage.publish_file(Path(__file__), "s3://b/a")
    assert len(sent) == 2


def test_folders_that_go_while_they_are_walked_are_empty_where_that_is_meant(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"x")

    def walked(**how):
        found = []
        for entry in storage.walk(str(tmp_path), **how):
            found.append(entry.path)
            shutil.rmtree(tmp_path / ("b" if entry.path == "a/file" else "a"), ignore_errors=True)
        return found

    assert len(walked(may_vanish=True)) == 1
    (tmp_path / "a").mkdir(exist_ok=True)
    (tmp_path / "b").mkdir(exist_ok=True)
    for name in ("a", "b"):
        (tmp_path / name / "file").write_bytes(b"x")
    with pytest.raises(FileNotFoundError):
        walked()


def test_an_upload_that_is_gone_is_aborted(bucket):
    """By another gc, or by the bucket's rule: it was asked for until the patience was over."""
    name, _, key = bucket.removeprefix("s3://").partition("/")
    boto3.client("s3").create_multipart_upload(Bucket=name, Key=f"{key}/a")
    (upload,) = storage.abandoned_uploads(bucket, older_than_hours=0)
    for _ in range(2):
        storage.abort_upload(upload)
    assert not list(storage.abandoned_uploads(bucket, older_than_hours=0))
