"""What a run has to tell, on local disk first: training never waits for the tracking server and loses nothing to it.

    records.jsonl   one record a line, appended and never changed
    drained         how many bytes of it have been handed over
    images/         the pictures that records point to, removed once handed over

A thread hands records over in order. It is idempotent from end to end: what was handed over and not yet noted, or is
told again after a rollback, is recognised by its step and left out.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)

_LONGEST_WAIT_SECONDS = 60.0
_RECORDS_AT_ONCE = 500


@dataclass(frozen=True)
class Record:
    """`values`: metric names and values; or, for an image, its key and the file's name; or tags."""

    kind: Literal["metrics", "image", "tags"]
    step: int
    timestamp_ms: int
    values: dict[str, Any]


class Spool:
    """Appends records to a folder and hands them to `deliver` from a thread of its own.

    Args:
        directory: made if need be; one writer at a time.
        deliver: is handed records in order and raises when the other side did not take them; it must leave out what it
            took before.
        interval_seconds: between two looks at new records.
    """

    def __init__(
        self, directory: Path, deliver: Callable[[list[Record]], None], *, interval_seconds: float = 1.0
    ) -> None:
        self.directory, self._deliver, self._interval_seconds = directory, deliver, interval_seconds
        self.images = directory / "images"
        self.images.mkdir(parents=True, exist_ok=True)
        self._records, self._drained = directory / "records.jsonl", directory / "drained"
        self._drop_torn_line()
        self._file = self._records.open("ab")
        self._offset = int(self._drained.read_text()) if self._drained.exists() else 0
        self._lock, self._wake, self._stop = threading.Lock(), threading.Event(), threading.Event()
        self._outage = False
        self._thread = threading.Thread(target=self._run, name="tracking-spool", daemon=True)
        self._thread.start()

    def append(self, kind: Literal["metrics", "image", "tags"], step: int, values: dict[str, Any]) -> None:
        """Keep a record; it is on disk, not yet synced, when this returns."""
        line = {"kind": kind, "step": step, "timestamp_ms": int(time.time() * 1000), "values": values}
        with self._lock:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()

    def left(self) -> int:
        """Records that have not been handed over."""
        with self._records.open("rb") as file:
            file.seek(self._offset)
            return sum(1 for _ in file)

    def flush(self, *, timeout_seconds: float) -> int:
        """Hand over what is there; returns how many records are left when the time is up."""
        deadline = time.monotonic() + timeout_seconds
        while self.left() and time.monotonic() < deadline:
            self._wake.set()
            time.sleep(0.05)
        return self.left()

    def close(self) -> None:
        """End the thread; what is left stays on disk for the next one."""
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout=_LONGEST_WAIT_SECONDS)
        self._file.close()

    def _drop_torn_line(self) -> None:
        """A kill may have cut the last line short; nothing was promised for it."""
        if self._records.exists():
            data = self._records.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.truncate(self._records, whole)

    def _run(self) -> None:
        wait = self._interval_seconds
        while not self._stop.is_set():
            self._wake.wait(wait)
            self._wake.clear()
            try:
                while self._drain_some():
                    pass
                wait = self._interval_seconds
                if self._outage:
                    log.info("tracking: the server answers again; all records are handed over")
                self._outage = False
            except Exception as error:  # whatever it is, training goes on and the records stay
                wait = min(2 * wait, _LONGEST_WAIT_SECONDS)
                if not self._outage:
                    log.warning(
                        "tracking: records are kept in %s until the server takes them: %s", self.directory, error
                    )
                self._outage = True

    def _drain_some(self) -> bool:
        with self._records.open("rb") as file:
            file.seek(self._offset)
            lines = [line for _, line in zip(range(_RECORDS_AT_ONCE), file, strict=False) if line.endswith(b"\n")]
        if not lines:
            return False
        records = [Record(**json.loads(line)) for line in lines]
        self._deliver(records)
        self._offset += sum(map(len, lines))
        aside = self._drained.with_suffix(".tmp")
        aside.write_text(str(self._offset))
        aside.replace(self._drained)
        for record in records:
            if record.kind == "image":
                (self.images / record.values["file"]).unlink(missing_ok=True)
        return True
