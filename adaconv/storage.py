"""Local paths and s3:// behind one small interface, and how a result is published: whole or not at all.

S3 through s3fs; endpoint, region and credentials by the standard AWS variables (AWS_ENDPOINT_URL and the like).
A local path is written aside, synced and renamed. An object of S3 is whole or absent by itself; a folder there is
published by the file that readers look for, which is written last.
"""

import os
import shutil
import tempfile
import threading
import uuid
from pathlib import Path
from typing import Any

import fsspec

_ATTEMPTS = 8  # botocore retries 5xx and throttling with backoff, each read or write by itself
_local = threading.local()


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
    return bool(_filesystem(uri).exists(uri))


def size_of(uri: str) -> int:
    return int(_filesystem(uri).size(uri))


def read_bytes(uri: str) -> bytes:
    data: bytes = _filesystem(uri).cat_file(uri)
    return data


def read_range(uri: str, offset: int, size: int) -> bytes:
    data: bytes = _filesystem(uri).cat_file(uri, start=offset, end=offset + size)
    return data


def list_directories(uri: str) -> list[str]:
    """Folders right below a folder, sorted; none where it does not exist."""
    return _entries(uri, "directory")


def list_files(uri: str) -> list[str]:
    """Files right below a folder, sorted; none where it does not exist."""
    return _entries(uri, "file")


def publish_bytes(uri: str, data: bytes) -> None:
    """Write a file so that a reader sees all of it or none, whenever this process is killed."""
    if not is_local(uri):
        _filesystem(uri).pipe_file(uri, data)
        return
    target = Path(uri)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def publish_file(path: Path, uri: str) -> None:
    """Copy a local file to where readers see all of it or none."""
    if not is_local(uri):
        _filesystem(uri).put_file(str(path), uri)
        return
    target = Path(uri)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        shutil.copyfile(path, aside)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


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
    aside = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        aside.mkdir()
        for name in [*names, last]:
            publish_file(source / name, str(aside / name))
        if target.exists():
            remove_directory(uri, first=last)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove(uri: str) -> None:
    filesystem = _filesystem(uri)
    if filesystem.exists(uri):
        filesystem.rm_file(uri)


def remove_directory(uri: str, *, first: str) -> None:
    """Remove a folder, beginning with the file that says that it is whole."""
    remove(join(uri, first))
    filesystem = _filesystem(uri)
    if filesystem.exists(uri):
        filesystem.rm(uri, recursive=True)


def local_copy(uri: str, *, cache_dir: str | None = None) -> Path:
    """The file as a local path: itself, or a copy that is fetched once to a cache folder."""
    if is_local(uri):
        return Path(uri)
    folder = Path(cache_dir) if cache_dir else Path(tempfile.gettempdir()) / "adaconv-cache"
    target = folder / uri.partition("://")[2]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:8]}")
        try:
            _filesystem(uri).get_file(uri, str(aside))
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)
    return target


def local_directory(uri: str) -> Path:
    """A flat folder as a local one: itself, or a fresh copy."""
    if is_local(uri):
        return Path(uri)
    target = Path(tempfile.mkdtemp(prefix="adaconv-fetch-"))
    for file in list_files(uri):
        _filesystem(uri).get_file(file, str(target / name_of(file)))
    return target


def _entries(uri: str, kind: str) -> list[str]:
    filesystem = _filesystem(uri)
    if not filesystem.exists(uri):
        return []
    filesystem.invalidate_cache(uri)
    scheme = "" if is_local(uri) else uri.partition("://")[0] + "://"
    found = [entry for entry in filesystem.ls(uri, detail=True) if entry["type"] == kind]
    # Some clients of S3 keep a folder as an empty object of its name.
    names = [entry["name"].rstrip("/") for entry in found if entry["name"].rstrip("/") != uri.rstrip("/")]
    return sorted(scheme + name for name in names if not name_of(name).startswith("."))


def _filesystem(uri: str) -> Any:
    """One client a process and thread: s3fs survives neither a fork nor two event loops."""
    protocol = "file" if is_local(uri) else uri.partition("://")[0]
    clients = _local.__dict__.setdefault("clients", {})
    key = (protocol, os.getpid())
    if key not in clients:
        options: dict[str, Any] = {}
        if protocol == "s3":
            options = {
                "config_kwargs": {"retries": {"max_attempts": _ATTEMPTS, "mode": "standard"}, "read_timeout": 30},
                "skip_instance_cache": True,
                "use_listings_cache": False,
            }
        clients[key] = fsspec.filesystem(protocol, **options)
    return clients[key]
