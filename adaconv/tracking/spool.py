"""What a run has to tell, on local disk first: training never waits for the tracking server and loses nothing to it.

    records.jsonl   one record a line, appended and never changed
    drained         how many bytes of it have been handed over
    refused.jsonl   records that the server will never take, each with its answer
    images/         the pictures that records point to, removed once handed over
    lock            held by the process that writes and hands over; the kernel lets go of it with the process
    driver          held by the process that opened the run, in the same way

A thread hands records over in order. It is idempotent from end to end: what was handed over and not yet noted, or is
told again after a rollback, is recognised by its step and left out.
"""

import contextlib
import fcntl
import json
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)

Kind = Literal["metrics", "image", "checkpoint", "status"]

_DRAINED = "drained"
_LONGEST_WAIT_SECONDS = 60.0
_RECORDS_AT_ONCE = 500
_PENDING_AT_MOST = 100_000  # lines kept in memory while the disk takes none
_OWNER_GOES_SECONDS = 15.0
_FAILURES_WAITED_FOR = 5


class Refused(Exception):
    """The other side will not take a record, now or later; `str()` is what it answered."""


@dataclass(frozen=True)
class Record:
    """`values`: metric names and values; an image's key and file; a checkpoint; or the status of the run."""

    kind: Kind
    step: int
    timestamp_ms: int
    values: dict[str, Any]


def handed_over(directory: Path) -> int:
    """Bytes of a spool's records that the other side has taken, as its note says; 0 where this is cut or not there."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int((directory / _DRAINED).read_bytes())
    return 0


class Spool:
    """Appends records to a folder and hands them to `deliver` from a thread of its own.

    Args:
        directory: made if need be.
        deliver: is handed records in order and raises when the other side did not take them; it must leave out what it
            took before. `Refused` sets a record aside for good.
        interval_seconds: between two looks at new records.
        from_start: hand over all records, for the other side is not the one that took some before.

    Raises:
        BlockingIOError: another process has the folder and keeps it.
    """

    def __init__(
        self,
        directory: Path,
        deliver: Callable[[list[Record]], None],
        *,
        interval_seconds: float = 5.0,
        from_start: bool = False,
    ) -> None:
        self.directory, self._deliver, self._interval_seconds = directory, deliver, interval_seconds
        self.images = directory / "images"
        self.images.mkdir(parents=True, exist_ok=True)
        self._owner = own(directory / "lock")
        self._records, self._drained = directory / "records.jsonl", directory / _DRAINED
        self._drop_torn_line()
        self._file = self._records.open("ab", buffering=0)
        self._size = self._file.tell()
        self._status_ms = self._newest_status_ms()
        self._pending: list[bytes] = []
        if from_start:
            self._drained.unlink(missing_ok=True)
        self._offset = self._noted_offset()
        self._lock, self._wake, self._stop = threading.Lock(), threading.Event(), threading.Event()
        self.problem: Exception | None = None
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="tracking-spool", daemon=True)
        self._thread.start()

    def append(self, kind: Kind, step: int, values: dict[str, Any]) -> None:
        """Keep a record: on disk, not yet synced, when this returns; in memory while the disk is full."""
        now = int(time.time() * 1000)
        if kind == "status":  # of two the later one counts: later as told, though the clock was put back in between
            now = self._status_ms = max(now, self._status_ms + 1)
        line = {"kind": kind, "step": step, "timestamp_ms": now, "values": values}
        with self._lock:
            self._pending.append(json.dumps(line).encode() + b"\n")
            self._write_pending()

    def left(self) -> int:
        """Records that have not been handed over."""
        with self._records.open("rb") as file:
            file.seek(self._offset)
            return sum(1 for _ in file) + len(self._pending)

    def flush(self, *, timeout_seconds: float) -> int:
        """Hand over what is there; returns how many records are left when the time is up, or the other side has
        failed so often meanwhile that nobody should wait for it.
        """
        deadline, failures = time.monotonic() + timeout_seconds, self._failures
        while self._waits() and time.monotonic() < deadline and self._failures < failures + _FAILURES_WAITED_FOR:
            self._wake.set()
            time.sleep(0.05)
        return self.left()

    def close(self) -> None:
        """End the thread; what is left stays on disk for the next one."""
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout=_LONGEST_WAIT_SECONDS)
        self._file.close()
        os.close(self._owner)

    def _waits(self) -> bool:
        """Whether anything is left; to count it takes a look at every line."""
        return bool(self._pending) or self._offset < self._size

    def _write_pending(self) -> None:
        data = b"".join(self._pending)
        try:
            if self._file.write(data) != len(data):
                raise OSError(f"{self._records}: the disk took only a part")
        except OSError as error:  # a full disk is no reason to stop training
            with contextlib.suppress(OSError):
                os.truncate(self._records, self._size)
            if len(self._pending) == 1:
                log.warning("tracking: cannot write to %s: %s; records wait in memory", self._records, error)
            del self._pending[:-_PENDING_AT_MOST]
        else:
            self._size += len(data)
            self._pending.clear()

    def _drop_torn_line(self) -> None:
        """A kill may have cut the last line short; nothing was promised for it."""
        if not self._records.exists() or not (size := self._records.stat().st_size):
            return
        with self._records.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            whole = data.rfind(b"\n") + 1  # looks at the end alone, however long the run was
        if whole < size:
            os.truncate(self._records, whole)

    def _newest_status_ms(self) -> int:
        """0 where no status was told."""
        if not self._size:
            return 0
        with self._records.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            at = data.rfind(b'{"kind": "status"')
            if at < 0 or (record := _parse(data[at : data.find(b"\n", at)])) is None:
                return 0
        return record.timestamp_ms

    def _noted_offset(self) -> int:
        """What `drained` says, if it fits the records: a loss of power may take the end of these, which are not synced,
        and leave a note that counts it.
        """
        if 0 < (offset := handed_over(self.directory)) <= self._size:
            return offset
        self._drained.unlink(missing_ok=True)  # else it would fit again once the records have grown
        return 0  # what was handed over is recognised by whoever takes it

    def _run(self) -> None:
        wait = self._interval_seconds
        while not self._stop.is_set():
            self._wake.wait(wait)
            self._wake.clear()
            try:
                while self._drain_some():
                    pass
                wait = self._interval_seconds
                if self.problem:
                    log.info("tracking: the server answers again; all records are handed over")
                self.problem = None
            except Exception as error:  # whatever it is, training goes on and the records stay
                wait = min(2 * wait, _LONGEST_WAIT_SECONDS)
                if not self.problem:
                    log.warning(
                        "tracking: records are kept in %s until the server takes them: %s", self.directory, error
                    )
                self.problem = error
                self._failures += 1

    def _drain_some(self) -> bool:
        if self._pending:
            with self._lock:
                self._write_pending()
        with self._records.open("rb") as file:
            file.seek(self._offset)
            lines = [line for line in islice(file, _RECORDS_AT_ONCE) if line.endswith(b"\n")]
        if not lines:
            return False
        records = [record for line in lines if (record := _parse(line)) is not None]
        try:
            self._deliver(records)
        except Refused:
            for record in records:
                self._deliver_or_set_aside(record)
        self._offset += sum(map(len, lines))
        aside = self._drained.with_suffix(".tmp")
        aside.write_text(str(self._offset))
        aside.replace(self._drained)
        for record in records:
            if record.kind == "image":
                (self.images / Path(record.values["file"]).name).unlink(missing_ok=True)
        return True

    def _deliver_or_set_aside(self, record: Record) -> None:
        try:
            self._deliver([record])
        except Refused as error:
            log.warning("tracking: the server refuses a record of step %d: %s", record.step, error)
            with (self.directory / "refused.jsonl").open("a") as file:
                file.write(json.dumps({**asdict(record), "answer": str(error)}) + "\n")


def _parse(line: bytes) -> Record | None:
    try:
        return Record(**json.loads(line))
    except (ValueError, TypeError) as error:
        log.warning("tracking: passing over a damaged record (%s): %.80r", error, line)
        return None


def own(path: Path) -> int:
    """Lock a file for this process; one that is being killed may take a moment to let go. Returns what to close.

    Raises:
        BlockingIOError: another process has it and keeps it.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + _OWNER_GOES_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(handle)
                raise BlockingIOError(f"{path}: another process tells this run; it must end first") from None
            time.sleep(0.1)
