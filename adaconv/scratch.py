"""Folders for the time of a piece of work. What a killed process left of its own, the next one removes."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adaconv.errors import UsageError

_SWEEP_SECONDS = 60
_swept: dict[Path, float] = {}


@contextmanager
def scratch_folder(what: str, parent: str | Path | None = None) -> Iterator[Path]:
    """An empty folder, gone when the block is left.

    A lock beside it is held as long as its process lives, however that ends: a worker that ran out of memory among its
    tiles leaves gigabytes.

    Args:
        what: it is for; part of its name.
        parent: made where it is missing; None: the system's temporary folder.
    """
    within = Path(parent or tempfile.gettempdir()).expanduser()
    within.mkdir(parents=True, exist_ok=True)
    _sweep(within)
    folder = Path(tempfile.mkdtemp(prefix=f"adaconv-{what}-", dir=within))
    lock = _lock_of(folder)
    with lock.open("w") as held:
        with contextlib.suppress(OSError):  # some network file systems have no locks: nothing is swept there
            fcntl.flock(held, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def kept_folder(what: str) -> Path:
    """A folder of this user's in the system's temporary folder, for what is there for the next process too; not made.

    Raises:
        UsageError: somebody else made it, who could put anything there.
    """
    folder = Path(tempfile.gettempdir()) / f"adaconv-{what}-{os.geteuid()}"
    if folder.is_symlink() or (folder.exists() and folder.stat().st_uid != os.geteuid()):
        raise UsageError(
            f"expected a folder of this user's, or none, at {folder}, found somebody else's; remove it, or "
            "give another temporary folder by TMPDIR"
        )
    return folder


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _sweep(within: Path) -> None:
    """Remove folders whose process is gone; now and then, for the temporary folder may hold many files."""
    if time.monotonic() - _swept.get(within, -_SWEEP_SECONDS) < _SWEEP_SECONDS:
        return
    _swept[within] = time.monotonic()
    for lock in within.glob("adaconv-*.lock"):
        with contextlib.suppress(OSError), lock.open() as held:  # another user's, or just removed
            status = os.fstat(held.fileno())
            if status.st_uid != os.geteuid():  # who could name a folder of ours, such as one that is kept
                continue
            if time.time() - status.st_mtime < _SWEEP_SECONDS:
                continue  # just made, perhaps not yet held
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)
