"""Against a real HTTP server on loopback that breaks off, refuses ranges or answers errors when told to."""

import hashlib
import multiprocessing
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from adaconv.download import DownloadError, download

DATA = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        server.asked.append(start)
        data, version = server.files.pop(0) if len(server.files) > 1 else server.files[0]
        if "If-Range" in self.headers and self.headers["If-Range"] not in version.values():
            start = 0
        if server.failures:
            self.send_error(server.failures.pop(0))
            return
        if start and server.ranges and start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.end_headers()
            return
        body = data[start:] if server.ranges else data
        self.send_response(206 if start and server.ranges else 200)
        self.send_header("Content-Length", str(len(body)))
        for header in version.items():
            self.send_header(*header)
        self.end_headers()
        if server.break_after:
            self.wfile.write(body[: server.break_after.pop(0)])
        else:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    running = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    running.asked, running.failures, running.break_after, running.ranges = [], [], [], True
    running.files = [(DATA, {})]  # that one request after the other finds, and what it is told of their versions
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def url_of(server):
    return f"http://127.0.0.1:{server.server_port}/weights.pth"


def test_a_file_is_fetched_once(server, tmp_path):
    target = tmp_path / "cache" / "weights.pth"
    for _ in range(2):
        assert download(url_of(server), target, sha256=SHA256).read_bytes() == DATA
    assert server.asked == [0]


def test_a_broken_off_download_goes_on_where_it_stopped(server, tmp_path):
    server.break_after = [100_000, 50_000]
    target = tmp_path / "weights.pth"
    assert download(url_of(server), target, sha256=SHA256, backoff_seconds=0).read_bytes() == DATA
    assert server.asked == [0, 100_000, 150_000]
    assert not target.with_name("weights.pth.part").exists()


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.break_after, server.ranges = [100_000], False
    assert download(url_of(server), tmp_path / "w", sha256=SHA256, backoff_seconds=0).read_bytes() == DATA


def test_what_was_fetched_to_its_last_byte_is_not_fetched_again(server, tmp_path):
    (tmp_path / "w.part").write_bytes(DATA)
    assert download(url_of(server), tmp_path / "w", sha256=SHA256).read_bytes() == DATA


def test_the_rest_of_another_file_is_thrown_away(server, tmp_path):
    (tmp_path / "w.part").write_bytes(b"x" * 400_000)
    assert download(url_of(server), tmp_path / "w", sha256=SHA256, backoff_seconds=0).read_bytes() == DATA


@pytest.mark.parametrize(
    ("first", "second", "asked"),
    [
        ({"ETag": '"a"'}, {"ETag": '"b"'}, [0, 100_000]),
        ({"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}, {"Last-Modified": "Tue, 02 Jan 2024 00:00:00 GMT"}, None),
        ({"ETag": 'W/"a"'}, {"ETag": 'W/"a"'}, [0, 0]),
        ({}, {}, [0, 0]),
    ],
)
def test_no_two_versions_of_a_file_become_one(server, tmp_path, first, second, asked):
    """It is replaced between two attempts, and nobody knows its sha256."""
    server.files, server.break_after = [(bytes(len(DATA)), first), (DATA, second)], [100_000]
    assert download(url_of(server), tmp_path / "w", sha256=None, backoff_seconds=0).read_bytes() == DATA
    assert server.asked == (asked or [0, 100_000])
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


def test_the_same_version_goes_on_where_it_stopped(server, tmp_path):
    server.files, server.break_after = [(DATA, {"ETag": '"a"'})], [100_000]
    assert download(url_of(server), tmp_path / "w", sha256=None, backoff_seconds=0).read_bytes() == DATA
    assert server.asked == [0, 100_000]


def test_passing_server_errors_are_waited_for(server, tmp_path):
    server.failures = [503, 429]
    assert download(url_of(server), tmp_path / "w", sha256=SHA256, backoff_seconds=0).read_bytes() == DATA


def test_a_missing_file_is_said_at_once(server, tmp_path):
    server.failures = [404]
    with pytest.raises(DownloadError, match="404"):
        download(url_of(server), tmp_path / "w", sha256=None)
    assert len(server.asked) == 1


def test_wrong_bytes_are_refused_and_not_kept(server, tmp_path):
    with pytest.raises(DownloadError, match=f"begins with 00000000, found {SHA256}"):
        download(url_of(server), tmp_path / "w", sha256="00000000")
    assert not list(tmp_path.glob("w")) + list(tmp_path.glob("*.part"))


def test_no_server_names_the_cause_and_what_is_kept(tmp_path):
    (tmp_path / "w.part").write_bytes(DATA[:7])
    with pytest.raises(DownloadError, match=r"refused.*7 bytes of it are kept"):
        download("http://127.0.0.1:9/w", tmp_path / "w", sha256=None, backoff_seconds=0)


def test_only_http_is_fetched(tmp_path):
    with pytest.raises(DownloadError, match="expected a URL of http"):
        download("file:///etc/passwd", tmp_path / "w", sha256=None)


def _download(url, target):
    download(url, target, sha256=SHA256)


def test_processes_of_a_machine_fetch_once(server, tmp_path):
    spawn = multiprocessing.get_context("spawn")
    children = [spawn.Process(target=_download, args=(url_of(server), tmp_path / "w")) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert server.asked == [0]
