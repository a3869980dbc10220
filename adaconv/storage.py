"""Local paths and s3:// behind one small interface, and how a result is published: whole or not at all.

S3 through s3fs; endpoint, region and credentials by the standard AWS variables (AWS_ENDPOINT_URL and the like).
A local path is written aside, synced and renamed. An object of S3 is whole or absent by itself; a folder there is
published by the file that readers look for, which is written last.

What a server answers for a while (5xx, throttling, a cut connection, none at all) is tried again with growing pauses,
for ADACONV_STORAGE_PATIENCE seconds (60) in all, then a ConnectionError names the object and what was the matter.
"""

import errno
import io
import logging
import os
import random
import shutil
import stat
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from adaconv.errors import CredentialsError, UsageError
from adaconv.scratch import scratch_folder

log = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")

_TRANSIENT = {errno.EIO, errno.EREMOTEIO, errno.EBUSY, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED}
_NOT_BELIEVED = {  # S3's codes, which s3fs makes PermissionErrors of, or EINVAL as of some forty others
    *("AccountProblem", "AuthorizationHeaderMalformed", "ExpiredToken", "InvalidAccessKeyId", "InvalidSecurity"),
    *("InvalidToken", "NotSignedUp", "RequestTimeTooSkewed", "SignatureDoesNotMatch", "TokenRefreshRequired"),
    "400",  # of a question that is answered without words, such as one for a size
}
_OF_THE_NETWORK = {
    *("aiohttp.ClientError", "botocore.HTTPClientError", "botocore.ConnectionError", "botocore.ResponseParserError"),
    "http.IncompleteRead",
}
_LONGEST_PAUSE_SECONDS, _LEAST_ATTEMPTS = 10.0, 4
_WRITE_SECONDS, _LEAST_BYTES_A_SECOND = 60.0, 64e3  # of an attempt to write
_DELETED_AT_ONCE = 1000  # by one request, as S3 bounds it
_READ_BYTES = 2**20
_ABANDONED_SECONDS = 3600.0  # what nobody has written to for so long belongs to a process that was killed
_AT_ONCE = 8  # small files on their way
_CONNECTIONS = 64  # of a client; botocore's own 10 would be all that threads share
_clients: dict[tuple[str, int], Any] = {}
_making = threading.Lock()


@dataclass(frozen=True)
class Entry:
    """A file below a folder: `path` is relative to it, with forward slashes; `stamp` changes when the file does.

    `changed`: when it last did, in seconds since 1970.
    """

    uri: str
    path: str
    bytes: int
    stamp: str
    changed: float


def is_local(uri: str) -> bool:
    return "://" not in uri


def absolute(uri: str) -> str:
    """A local path made absolute, for other processes have other working directories; anything else as it is."""
    return str(Path(uri).expanduser().absolute()) if is_local(uri) else uri.rstrip("/")


def join(base: str, *parts: str) -> str:
    return "/".join([base.rstrip("/"), *parts]) if not is_local(base) else os.path.join(base, *parts)


def name_of(uri: str) -> str:
    """The last part of a path or URI."""
    return uri.rstrip("/").rpartition("/")[2]


def exists(uri: str) -> bool:
    return bool(_patiently(uri, lambda: _filesystem(uri).exists(uri)))


def is_directory(uri: str) -> bool:
    if is_local(uri):
        return Path(uri).is_dir()
    # Not s3fs's own answer, for which it lists all that the folder holds.
    bucket, prefix = _bucket_and_prefix(uri)
    try:
        page = _patiently(
            uri, lambda: _filesystem(uri).call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
        )
    except FileNotFoundError:  # no such bucket
        return False
    return bool(page.get("Contents")) or not prefix


def size_of(uri: str) -> int:
    return int(_patiently(uri, lambda: _filesystem(uri).size(uri)))


def stamp_of(uri: str) -> str:
    """Changes when the file does: its time of change here, its ETag on an object store."""
    if is_local(uri):
        return str(Path(uri).stat().st_mtime_ns)
    return str(_patiently(uri, lambda: _filesystem(uri).info(uri))["ETag"]).strip('"')


def read_bytes(uri: str, *, at_once: bool = False) -> bytes:
    """A whole file; by one request if `at_once`, else after a look at its size, for large ones come in parts."""
    if is_local(uri):  # fsspec takes longer than the disk for a file of an image's size
        return Path(uri).read_bytes()
    options = {"max_concurrency": 1} if at_once else {}
    data: bytes = _patiently(uri, lambda: _filesystem(uri).cat_file(uri, **options))
    return data


def read_range(uri: str, offset: int, size: int) -> bytes:
    """Fewer bytes, or none, where the file ends before."""
    try:
        data: bytes = _patiently(uri, lambda: _filesystem(uri).cat_file(uri, start=offset, end=offset + size))
    except OSError as error:
        if _code_of(error) in ("InvalidRange", "416"):  # an object store refuses a range that lies past the end
            return b""
        raise
    return data


def open_binary(uri: str) -> io.BufferedReader:
    """The file for reading at any place; on an object store each read fetches what it needs, patiently."""
    return Path(uri).open("rb") if is_local(uri) else io.BufferedReader(_Object(uri), _READ_BYTES)


class _Object(io.RawIOBase):
    """An object of a store. s3fs's own file gives up at the first answer that is none."""

    def __init__(self, uri: str) -> None:
        self._uri, self._size, self._place = uri, size_of(uri), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._place)
        if wanted <= 0:
            return 0
        data = read_range(self._uri, self._place, wanted)
        if len(data) != wanted:
            raise OSError(f"{self._uri}: expected {self._size} bytes, it was replaced by a shorter one meanwhile")
        buffer[:wanted] = data
        self._place += wanted
        return wanted


def walk(uri: str, *, hidden: bool = False, may_vanish: bool = False) -> Iterator[Entry]:
    """Every file below a folder, in no particular order and one at a time, so that memory does not grow with them.

    Links are followed, though none in a circle. What begins with a dot is left out unless `hidden`, folders as well;
    lost+found, which most file systems have at their top and keep from all but root, is always. Folders that
    `may_vanish` while they are walked are empty then.
    """
    if is_local(uri):
        yield from _walk_local(uri, "", (), hidden, may_vanish) if Path(uri).is_dir() else ()
    else:
        yield from _walk_objects(uri.rstrip("/"), hidden)


def list_directories(uri: str) -> list[str]:
    """Folders right below a folder, sorted; none where it does not exist."""
    return _entries(uri, "directory")


def list_files(uri: str) -> list[str]:
    """Files right below a folder, sorted; none where it does not exist."""
    return _entries(uri, "file")


def publish_bytes(uri: str, data: bytes) -> None:
    """Write a file so that a reader sees all of it or none, whenever this process is killed."""
    if not is_local(uri):
        _patiently(uri, lambda: _filesystem(uri).pipe_file(uri, data, timeout=_time_for(len(data))))
        return
    with _replacing(Path(uri)) as aside:
        aside.write_bytes(data)


def publish_if_absent(uri: str, data: bytes) -> None:
    """publish_bytes where nothing lies yet; of several at once, one is kept.

    Where a file system has no hard links, or a store no conditional writes, the last one is.
    """
    if exists(uri):
        return
    if is_local(uri):
        with _replacing(Path(uri), keep=True) as aside:
            aside.write_bytes(data)
        return
    try:
        _patiently(uri, lambda: _filesystem(uri).pipe_file(uri, data, mode="create", timeout=_time_for(len(data))))
    except OSError as error:
        if _code_of(error) in ("NotImplemented", "501"):
            publish_bytes(uri, data)
        elif _code_of(error) not in ("PreconditionFailed", "412"):
            raise


def publish_file(path: Path, uri: str) -> None:
    """Copy a local file to where readers see all of it or none."""
    if not is_local(uri):
        size = path.stat().st_size
        _patiently(uri, lambda: _filesystem(uri).put_file(str(path), uri, timeout=_time_for(size)))
        return
    with _replacing(Path(uri)) as aside:
        shutil.copyfile(path, aside)


@contextmanager
def _replacing(target: Path, *, keep: bool = False) -> Iterator[Path]:
    """A file beside the target to write, which takes its place, synced, when the block has ended.

    With `keep` only where there is none by then.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(target)
    try:
        with full_disk_named(str(target)):
            yield aside
            _sync(aside)
        if keep:
            _link(aside, target)
        else:
            aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def _link(aside: Path, target: Path) -> None:
    try:
        os.link(aside, target)
    except FileExistsError:
        pass
    except OSError:  # this file system has no hard links
        aside.replace(target)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:8]}")


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def file_for(folder: str) -> Iterator[Path]:
    """A local file to write what `publish_written` then publishes below a folder, on the same disk where it is one."""
    if not is_local(folder):
        with scratch_folder("written") as scratch, full_disk_named(str(scratch)):
            yield scratch / "file"
        return
    beside = Path(folder)
    beside.mkdir(parents=True, exist_ok=True)
    path = beside / f".written.tmp-{uuid.uuid4().hex}"
    try:
        with full_disk_named(folder):
            yield path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def full_disk_named(where: str) -> Iterator[None]:
    """A write that finds no room knows no path, and there may be several disks to make room on."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and (error.filename is None or error.filename2 is not None):
            raise OSError(error.errno, error.strerror, where) from error  # a copy names first what it was made of
        raise


def publish_written(path: Path, uri: str) -> None:
    """Move a file of `file_for` to where readers see all of it or none; a copy would cost as much as writing it."""
    if not is_local(uri):
        publish_file(path, uri)
        return
    _sync(path)
    path.replace(uri)


def publish_directory(source: Path, uri: str, *, last: str) -> None:
    """Publish a flat local folder; `last` names the file whose presence says that it is whole.

    What lies at `uri` from an attempt that was cut off, or from an earlier one, is replaced.
    """
    names = sorted(p.name for p in source.iterdir() if p.name != last)
    if not is_local(uri):
        remove_directory(uri, first=last)
        for name in [*names, last]:
            publish_file(source / name, join(uri, name))
        return
    target = Path(uri)
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    aside = _aside(target)
    try:
        aside.mkdir()
        for name in [*names, last]:
            publish_file(source / name, str(aside / name))
        if target.exists():
            remove_directory(uri, first=last)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes were publishing right below a folder; what is young may be another's work."""
    for aside in folder.glob(".*.tmp-*"):
        with suppress(FileNotFoundError):  # published, or swept by another
            if time.time() - aside.stat().st_mtime < _ABANDONED_SECONDS:
                continue
            if aside.is_dir():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.unlink()


def remove(uri: str) -> None:
    if exists(uri):
        _patiently(uri, lambda: _filesystem(uri).rm_file(uri))


def abandoned_uploads(uri: str, *, older_than_hours: float) -> list[Entry]:
    """Large objects below a prefix of which parts were sent, and then no more: they take room, and nobody lists them.

    `stamp` is the upload's id; none on a disk, and where a server does not tell.
    """
    if is_local(uri):
        return []
    bucket, prefix = _bucket_and_prefix(uri)
    limit, found = time.time() - older_than_hours * 3600, []
    more: dict[str, str] = {}
    while True:
        page = _patiently(
            uri,
            lambda: _filesystem(uri).call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **more),  # noqa: B023
        )
        for upload in page.get("Uploads", ()):
            key, begun = upload["Key"], upload["Initiated"].timestamp()
            if begun <= limit:
                entry = Entry(f"s3://{bucket}/{key}", key[len(prefix) :], 0, upload["UploadId"], begun)
                found.append(entry)
        if not page.get("IsTruncated"):
            return found
        more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def abort_upload(upload: Entry) -> None:
    """Nothing, if it is gone by then."""
    bucket, _, key = upload.uri.partition("://")[2].partition("/")

    def abort() -> None:
        try:
            _filesystem(upload.uri).call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload.stamp)
        except OSError as error:
            if _code_of(error) != "NoSuchUpload":
                raise

    _patiently(upload.uri, abort)


def remove_directory(uri: str, *, first: str | None = None) -> None:
    """Remove a folder, beginning with the file that says that it is whole, where there is one."""
    if first is not None:
        remove(join(uri, first))
    if is_local(uri):
        if Path(uri).exists():
            shutil.rmtree(uri)
        return
    # Not s3fs's own removal: it takes a [, * or ? of the path for a pattern, and deletes what matches.
    bucket, _ = _bucket_and_prefix(uri)
    remove_files(f"s3://{bucket}/{item['Key']}" for item in _objects(uri))


def remove_files(uris: Iterable[str]) -> None:
    """Of one folder or bucket; some may be gone already."""
    files = iter(uris)
    while some := list(islice(files, _DELETED_AT_ONCE)):
        if is_local(some[0]):
            for uri in some:
                Path(uri).unlink(missing_ok=True)
            continue
        keys = [{"Key": uri.partition("://")[2].partition("/")[2]} for uri in some]
        _patiently(some[0], partial(_delete, _bucket_and_prefix(some[0])[0], keys))


def _delete(bucket: str, keys: list[dict[str, str]]) -> None:
    """One request; the answer has errors of single keys in it."""
    uri = f"s3://{bucket}"
    answer = _filesystem(uri).call_s3("delete_objects", Bucket=bucket, Delete={"Objects": keys, "Quiet": True})
    for error in answer.get("Errors", ()):
        kind = PermissionError if error["Code"] == "AccessDenied" else ConnectionError  # which is tried again
        raise kind(f"{uri}/{error['Key']} was not deleted: {error['Code']}")


def few_at_once(call: Callable[[S], T], items: Iterable[S], *, where: str) -> Iterator[T]:
    """What a call gives for each item, in order; a few are under way at once on an object store, where each takes long.

    Args:
        call: reads or writes a small file.
        items: taken in this thread, a few ahead of what was given.
        where: a path or URI of where they lie.
    """
    if is_local(where):
        yield from map(call, items)
        return
    coming = iter(items)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        waiting = deque(pool.submit(call, item) for item in islice(coming, _AT_ONCE))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(call, item) for item in islice(coming, 1))


@contextmanager
def local_directory(uri: str) -> Iterator[Path]:
    """A flat folder as a local one: itself, or a copy for as long as the block lasts."""
    if is_local(uri):
        yield Path(uri)
        return
    with scratch_folder("fetch") as target:
        for file in list_files(uri):
            (target / name_of(file)).write_bytes(read_bytes(file))
        yield target


def _walk_local(
    folder: str, below: str, above: tuple[tuple[int, int], ...], hidden: bool, may_vanish: bool
) -> Iterator[Entry]:
    try:
        this, listed = os.stat(folder), os.scandir(folder)
    except FileNotFoundError:
        if may_vanish:
            return
        raise
    with listed as entries:
        if (this.st_dev, this.st_ino) in above:  # a link to a folder that it lies in
            return
        for entry in entries:
            if (entry.name.startswith(".") and not hidden) or entry.name == "lost+found":
                continue
            if _is_folder(entry):
                inside = (*above, (this.st_dev, this.st_ino))
                yield from _walk_local(entry.path, f"{below}{entry.name}/", inside, hidden, may_vanish)
                continue
            path = below + entry.name
            try:
                status = entry.stat()
                if not stat.S_ISREG(status.st_mode):  # a pipe would keep its reader for ever
                    continue
                yield Entry(entry.path, path, status.st_size, str(status.st_mtime_ns), status.st_mtime)
            except OSError:  # a link to nowhere: found, and for whoever reads it to refuse
                yield Entry(entry.path, path, 0, "", 0.0)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _walk_objects(uri: str, hidden: bool) -> Iterator[Entry]:
    bucket, prefix = _bucket_and_prefix(uri)
    for item in _objects(uri):
        below = item["Key"][len(prefix) :]
        if below.endswith("/") or not below:  # some clients keep a folder as an empty object of its name
            continue
        if hidden or not any(part.startswith(".") for part in below.split("/")):
            name, changed = f"s3://{bucket}/{item['Key']}", item["LastModified"].timestamp()
            yield Entry(name, below, item["Size"], item["ETag"].strip('"'), changed)


def _bucket_and_prefix(uri: str) -> tuple[str, str]:
    """The prefix is empty or ends with a slash."""
    bucket, _, path = uri.rstrip("/").partition("://")[2].partition("/")
    return bucket, path and path + "/"


def _objects(uri: str) -> Iterator[dict[str, Any]]:
    """Every object below a prefix, as S3 lists it."""
    bucket, prefix = _bucket_and_prefix(uri)
    page: dict[str, Any] = {}
    while True:
        more = {"ContinuationToken": page["NextContinuationToken"]} if page else {}
        page = _patiently(
            uri,
            lambda: _filesystem(uri).call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more),  # noqa: B023
        )
        yield from page.get("Contents", ())
        if not page.get("IsTruncated"):
            return


def _entries(uri: str, kind: str) -> list[str]:
    if not exists(uri):
        return []
    scheme = "" if is_local(uri) else uri.partition("://")[0] + "://"
    found = _patiently(uri, lambda: _filesystem(uri).ls(uri, detail=True))
    found = [entry for entry in found if entry["type"] == kind]
    # Some clients of S3 keep a folder as an empty object of its name.
    names = [entry["name"].rstrip("/") for entry in found if entry["name"].rstrip("/") != uri.rstrip("/")]
    return sorted(scheme + name for name in names if not name_of(name).startswith("."))


def _patiently(uri: str, call: Callable[[], T]) -> T:
    """Do it again, after growing pauses, while a server's answer is one that passes.

    Raises:
        ConnectionError: it did not pass.
        CredentialsError: whoever asks is not believed.
    """
    if is_local(uri):
        return call()
    began, attempt = time.monotonic(), 0
    while True:
        try:
            return call()
        except Exception as error:
            if type(error).__name__ == "NoCredentialsError":  # botocore's, which only s3:// imports
                raise CredentialsError(
                    f"{uri}: found no credentials for S3; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
                ) from None
            if (code := _code_of(error)) in _NOT_BELIEVED:
                raise CredentialsError(
                    f"{uri}: S3 refuses the credentials ({code}: {error}); renew them where the job's processes find "
                    "them and see that the clock is right; the same command goes on where this stopped"
                ) from error
            if not _passes(error):
                raise
            attempt += 1
            patience = float(os.environ.get("ADACONV_STORAGE_PATIENCE", "60"))
            pause = min(_LONGEST_PAUSE_SECONDS, 0.1 * 2**attempt) * random.uniform(0.5, 1)
            if attempt >= _LEAST_ATTEMPTS and time.monotonic() - began + pause > patience:
                raise ConnectionError(
                    f"{uri}: no answer in {patience:.0f} s, {attempt} attempts; the last said: {error}. "
                    "See that the server is up and AWS_ENDPOINT_URL right; the same command goes on where this stopped"
                ) from error
            log.debug("%s: %s; trying again in %.1f s", uri, error, pause)
            time.sleep(pause)


def _time_for(size: int) -> float:
    """Seconds that an attempt to write may take: the client's own limits are of answers, not of who takes nothing."""
    return _WRITE_SECONDS + size / _LEAST_BYTES_A_SECOND


def _code_of(error: Exception) -> str | None:
    """What an object store called a failure; s3fs gives many of them one number."""
    answer = getattr(error.__cause__, "response", None)
    return answer["Error"].get("Code") if answer else None


def _passes(error: Exception) -> bool:
    """Whether an answer of an object store may be another one in a moment."""
    if _code_of(error) == "NoSuchUpload":  # the answer to its completion was lost; all of it is sent anew
        return True
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
        return False
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    if isinstance(error, OSError) and error.errno in _TRANSIENT:
        return True
    # Clients of the network raise their own: where a body is cut, where nobody answers, or not in S3's language.
    roots = {kind.__module__.partition(".")[0] + "." + kind.__name__ for kind in type(error).__mro__}
    return bool(roots & _OF_THE_NETWORK)


def _filesystem(uri: str) -> Any:
    """One client a process, for it survives no fork. Threads share it: all of s3fs runs in one loop of a process, and
    another client takes a fifth of a second of a core to make.
    """
    protocol = "file" if is_local(uri) else uri.partition("://")[0]
    key = (protocol, os.getpid())
    if key in _clients:
        return _clients[key]
    with _making:
        if key in _clients:
            return _clients[key]
        if protocol not in ("file", "s3") or uri.startswith("file:"):
            raise UsageError(f"{uri}: expected a local path or s3://bucket/prefix, found {protocol}://")
        options: dict[str, Any] = {}
        if protocol == "s3":
            from botocore.handlers import add_expect_header

            logging.getLogger("aiobotocore").setLevel(logging.WARNING)  # tells where credentials come from, each time
            options = {
                # One attempt of the client's own: pauses are ours, so that all of them together have one bound.
                "config_kwargs": {
                    "retries": {"total_max_attempts": 1},
                    "read_timeout": 30,
                    "connect_timeout": 10,
                    "max_pool_connections": _CONNECTIONS,
                },
                "skip_instance_cache": True,
                "use_listings_cache": False,
            }
        client = fsspec.filesystem(protocol, **options)
        if protocol == "s3":
            client.retries = 1  # s3fs's own, five for each of botocore's
            client.connect()  # else threads that are the first would each do it
            # botocore lets a server say whether it wants what is sent; where it says nothing, aiohttp waits for ever.
            client._s3.meta.events.unregister("before-call.s3", add_expect_header)
        _clients[key] = client
    return client


def _make_anew() -> None:
    """In a forked process, where nobody may be left to let go of the lock."""
    global _making
    _making = threading.Lock()


os.register_at_fork(after_in_child=_make_anew)
