"""A file from a URL, once for a machine: resumed where it broke off, compared with its sha256, then published."""

import hashlib
import http.client
import logging
import os
import time
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path

from filelock import FileLock

from adaconv.progress import Progress

log = logging.getLogger(__name__)

_ATTEMPTS = 4
_TIMEOUT_SECONDS = 30
_CHUNK_BYTES = 1 << 20
_SCHEMES = ("http://", "https://")


class DownloadError(Exception):
    """The file could not be had, or is not what it should be; says why, and not what to do."""


def download(url: str, target: Path, *, sha256: str | None, backoff_seconds: float = 1.0) -> Path:
    """Fetch `url` to `target` unless it is there. Processes of one machine wait for each other.

    Args:
        url: http or https.
        target: local file; what is not whole yet lies beside it as `NAME.part`, and which version of the file it is of
            as `NAME.part.version`.
        sha256: the file's, or as many of its first hex digits as are known; None takes what comes.
        backoff_seconds: wait before the second attempt; doubled before each further one.

    Raises:
        DownloadError: the server refuses or cannot be reached, or the bytes have another sha256.
    """
    if not url.startswith(_SCHEMES):
        raise DownloadError(f"expected a URL of http or https, found {url}")
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    with FileLock(f"{target}.lock"):
        if target.exists():  # another process was faster
            return target
        for attempt in range(_ATTEMPTS):
            try:
                _continue(url, part, checked=sha256 is not None)
                break
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code != 429:
                    raise DownloadError(f"{url}: the server answers {error.code} {error.reason}") from error
                failure: Exception = error
            except (OSError, http.client.HTTPException) as error:
                failure = error
            if attempt == _ATTEMPTS - 1:
                have = part.stat().st_size if part.exists() else 0
                raise DownloadError(f"{url}: {failure} ({have} bytes of it are kept)") from failure
            log.warning("%s: %s; trying again", url, failure)
            time.sleep(backoff_seconds * 2**attempt)
        _version_file(part).unlink(missing_ok=True)
        _verify(url, part, sha256)
        os.replace(part, target)
    return target


def _continue(url: str, part: Path, *, checked: bool) -> None:
    """Fetch what is missing, of the same version of the file; all of it where nothing tells versions apart."""
    note = _version_file(part)
    version = note.read_text() if note.exists() else ""
    have = part.stat().st_size if part.exists() and (version or checked) else 0
    only_of = {"If-Range": version} if version else {}
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-", **only_of} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # nothing lies beyond what is here: it is all, or of another file
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return
            part.unlink()
            raise OSError("what was kept of an earlier attempt belongs to another file") from error
        raise
    with answer:
        resumed = answer.status == 206
        rest = int(answer.headers.get("Content-Length") or 0)
        total = rest + (have if resumed else 0)
        progress = Progress(f"download {url.rpartition('/')[2]}", total=round(total / 1e6), unit="MB")
        done = have if resumed else 0
        with part.open("ab" if resumed else "wb") as file:
            if not resumed:  # behind the old bytes, which are gone now
                note.write_text(_version_of(answer.headers))
            while chunk := answer.read(_CHUNK_BYTES):
                file.write(chunk)
                progress.advance(round((done + len(chunk)) / 1e6) - round(done / 1e6))
                done += len(chunk)
        if total and done < total:
            raise http.client.IncompleteRead(b"", total - done)
        progress.close()


def _version_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.version")


def _version_of(headers: Message) -> str:
    """What tells a file's versions apart: a strong ETag, else when it was changed; nothing of silent servers."""
    etag = headers.get("ETag", "")
    return str(etag if etag.startswith('"') else headers.get("Last-Modified", ""))


def _verify(url: str, part: Path, sha256: str | None) -> None:
    if sha256 is None:
        return
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(sha256):
        size = part.stat().st_size
        part.unlink()
        raise DownloadError(f"{url}: expected a file whose sha256 begins with {sha256}, found {found} ({size} bytes)")
