"""Shards of an object store as local files: fetched once a node, verified, and at most so many bytes of them.

    reader ──▶ ShardCache.path(uri, shard) ──▶ a local file: the shard itself where it lies on a disk, else a copy
    ShardPrefetcher walks the sample order ahead of the reader, so that the copy is there before it is asked for

The processes of a node share one folder. A shard's name is part of its sha256, so datasets may share it too.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from adaconv import storage
from adaconv.errors import DatasetError, UsageError
from adaconv.scratch import kept_folder

if TYPE_CHECKING:
    from adaconv.data.manifest import Shard

log = logging.getLogger(__name__)

_COPY = re.compile(r"[0-9a-f]{16}\.tar|\.[0-9a-f]{16}\.tar(?P<part>\.tmp-[0-9-]+)")
_PART_BYTES = 16 * 2**20
_TOUCH_EVERY_SECONDS = 60.0
_FARTHEST_STEPS = 4096
_AGAIN_SECONDS = 30.0  # after a shard that could not be fetched ahead
_ABANDONED_SECONDS = 600.0  # a copy that nobody has added to for so long belongs to a process that was killed


def default_cache_dir() -> str:
    return str(kept_folder("shards"))


@dataclass(frozen=True)
class ShardCache:
    """Local copies of shards below a folder.

    Args:
        folder: of the copies, shared by the processes of a node.
        limit_bytes: of all copies together; the least recently read ones make room for new ones.
    """

    folder: str
    limit_bytes: int

    def path(self, uri: str, shard: Shard) -> Path:
        """The shard as a local file. It may be gone a moment later: whoever opens it asks again.

        Raises:
            DatasetError: what was fetched, twice, is not what the dataset version says.
            UsageError: the shard is larger than the limit.
        """
        if storage.is_local(uri):
            return Path(uri)
        target = Path(self.folder) / shard.name
        if not _is_there(target, shard):
            target.parent.mkdir(parents=True, exist_ok=True)
            # Named by content, so shards share 256 locks evenly; one for each would stay for each that ever was here.
            with FileLock(target.with_name(f".{shard.name[:2]}.lock")):
                if not _is_there(target, shard):  # another process may have fetched it meanwhile
                    self._fetch(uri, shard, target)
        return target

    def _fetch(self, uri: str, shard: Shard, target: Path) -> None:
        aside = target.with_name(f".{shard.name}.tmp-{os.getpid()}-{threading.get_ident()}")
        self._make_room(aside, shard)
        began = time.monotonic()
        try:
            for attempt in (1, 2):
                with storage.full_disk_named(self.folder):
                    found = _download(uri, shard.bytes, aside)
                if found == shard.sha256:
                    break
                message = f"{uri}: expected a file of sha256 {shard.sha256}, fetched one of {found}"
                if attempt == 2:
                    raise DatasetError(f"{message}, twice; `pipelines/dataset.py verify` says what is damaged")
                log.warning("%s; fetching it again", message)
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)
        log.info("fetched %s, %.0f MB in %.1f s", uri, shard.bytes / 1e6, time.monotonic() - began)

    def _make_room(self, aside: Path, shard: Shard) -> None:
        """Remove the least recently read copies until the shard fits, and claim its bytes."""
        if shard.bytes > self.limit_bytes:
            raise UsageError(
                f"data.cache_gb: shard {shard.name} has {shard.bytes / 1e9:.2f} GB, the cache may hold "
                f"{self.limit_bytes / 1e9:.2f} GB; raise it"
            )
        with FileLock(aside.with_name(".cache.lock")):
            files = []
            for file in aside.parent.iterdir():
                if not (copy := _COPY.fullmatch(file.name)):
                    continue  # somebody else's: the folder may be one that holds other things
                with contextlib.suppress(FileNotFoundError):
                    status = file.stat()
                    if copy["part"] and time.time() - status.st_mtime > _ABANDONED_SECONDS:
                        file.unlink()
                    else:
                        files.append((status.st_mtime, status.st_size, file))
            used = sum(size for _, size, _ in files)
            for _, size, file in sorted(files):
                if used + shard.bytes <= self.limit_bytes:
                    break
                if not file.name.startswith("."):
                    file.unlink(missing_ok=True)
                    used -= size
            with aside.open("wb") as claim:
                claim.truncate(shard.bytes)  # counted by others from now on, before its bytes are there


def _is_there(target: Path, shard: Shard) -> bool:
    """Whether a copy is there, and if so, note that it was read."""
    try:
        status = target.stat()
    except FileNotFoundError:
        return False
    if status.st_size != shard.bytes:
        return False
    if time.time() - status.st_mtime > _TOUCH_EVERY_SECONDS:
        with contextlib.suppress(FileNotFoundError):
            os.utime(target)
    return True


def _download(uri: str, size: int, aside: Path) -> str:
    """Fetch a file of a known size in parts, each tried again by itself, and return its sha256."""
    digest = hashlib.sha256()
    with aside.open("r+b") as file:
        for offset in range(0, size, _PART_BYTES):
            part = storage.read_range(uri, offset, min(_PART_BYTES, size - offset))
            digest.update(part)
            file.write(part)
        os.fsync(file.fileno())  # a copy counts as whole by its length, which a loss of power may leave without bytes
    return digest.hexdigest()


class ShardPrefetcher:
    """A thread that fetches the shards of coming steps, in order, while those of now are read.

    Args:
        shards_of: what a step reads, as the functions that fetch it: pure, so that it can be asked ahead.
        ahead: distinct shards, the present step's among them, that are fetched before they are read; 0 fetches none.
        limit_bytes: that these may take: more than the cache has room for would make room for one another.
    """

    def __init__(
        self,
        shards_of: Callable[[int], Iterable[tuple[str, Shard]]],
        cache: ShardCache,
        *,
        ahead: int,
        limit_bytes: int,
    ):
        self._shards_of, self._cache, self._ahead, self._limit_bytes = shards_of, cache, ahead, limit_bytes
        self._step, self._done = 0, False
        self._moved = threading.Condition()
        self._thread: threading.Thread | None = None

    def follow(self, step: int) -> None:
        """The reader is at this step."""
        with self._moved:
            self._step = step
            self._moved.notify()
        if self._thread is None and self._ahead:
            self._thread = threading.Thread(target=self._run, name="shard-prefetch", daemon=True)
            self._thread.start()

    def close(self) -> None:
        with self._moved:
            self._done = True
            self._moved.notify()

    def _run(self) -> None:
        cursor = self._step
        coming: dict[Shard, int] = {}  # shard -> the last step that was seen to read it
        while not self._done:
            now = self._step
            cursor = max(cursor, now)
            coming = {shard: last for shard, last in coming.items() if last >= now}
            shards = {shard: uri for uri, shard in self._shards_of(cursor)}
            taken = sum(shard.bytes for shard in {*coming, *shards})
            if len(coming) >= self._ahead or taken > self._limit_bytes or cursor >= now + _FARTHEST_STEPS:
                with self._moved:
                    if self._step == now and not self._done:
                        self._moved.wait(timeout=5)
            elif all(shard in coming or self._fetched(uri, shard) for shard, uri in shards.items()):
                coming |= dict.fromkeys(shards, cursor)
                cursor += 1
            else:
                with self._moved:
                    self._moved.wait_for(lambda: self._done, timeout=_AGAIN_SECONDS)

    def _fetched(self, uri: str, shard: Shard) -> bool:
        """Whoever needs the shard meets the same error, and tells it."""
        try:
            self._cache.path(uri, shard)
        except Exception as error:
            log.warning("%s could not be fetched ahead: %s", uri, error)
            return False
        return True
