"""Status lines of long work, more and more seldom: how far, how fast, how long still. A job log is no terminal."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

_SHORTEST_SECONDS, _LONGEST_SECONDS = 5.0, 40.0
_LATE_SECONDS, _LEAST_SEEN = 600.0, 8  # of long jobs' answers, that come seldom and many at once, at least so many


class Due:
    """When a line is due: after 5 s, then when the work has lasted twice as long, in the end every 40 s.

    So somebody who watches soon sees something, and ten minutes have 18 lines at most, which leaves room for others.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._started = clock, clock()
        self._next = self._started + _SHORTEST_SECONDS

    def __call__(self) -> bool:
        """Whether one is due now; then the next one is later."""
        now = self._clock()
        if now < self._next:
            return False
        self._next = now + min(now - self._started, _LONGEST_SECONDS)
        return True


class Progress:
    """Counts work done and says so when a line is due.

    The line reads `stylize 120/1000 | 12 % | 8.3 images/s | 1 failed | eta 1.8 min`.
    """

    def __init__(
        self,
        what: str,
        *,
        total: int | None = None,
        unit: str = "images",
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
        emit: Callable[[str], None] = log.info,
    ) -> None:
        self._what, self.total, self._unit = what, total, unit
        self._clock, self._emit, self._is_due = clock, emit, Due(clock)
        self.done = self._free = done
        self._ahead = 0
        self._started = clock()
        self._seen = deque([(self._started, done, done)])  # when, how many were done, how many of them for free
        self._notes: dict[str, str] = {}
        self._lock = threading.Lock()

    def advance(self, count: int = 1, *, free: bool = False, **notes: object) -> None:
        """Add `count` units of work; `notes` stay on the line until they change (`failed=3` reads `3 failed`).

        What is `free`, such as what was found done, does not count towards the rate.
        """
        with self._lock:
            self.done += count
            self._free += count * free
            self._see()
            self._notes.update({name: str(value) for name, value in notes.items()})
            if self._is_due():
                self._emit(self.line())

    def look_ahead(self, count: int) -> None:
        """Say how many units are done that `advance` is yet to be told of, in place of how many were; by any thread."""
        with self._lock:
            self._ahead = count
            self._see()
            if self._is_due():
                self._emit(self.line())

    def close(self) -> None:
        """Emit the last line, due or not."""
        self._emit(self.line())

    def line(self) -> str:
        """The status as of now."""
        now, done = self._clock(), self._reached()
        since, done_then, free_then = self._seen[0]
        seconds, gone = max(now - since, 1e-9), max(0, done - done_then)
        rate = max(0, gone - (self._free - free_then)) / seconds
        parts = [f"{self._what} {done}" + (f"/{self.total}" if self.total is not None else "")]
        if self.total:
            parts.append(f"{100 * done / self.total:.0f} %")
        parts.append(f"{rate:.3g} {self._unit}/s")
        parts += [f"{value} {name.replace('_', ' ')}" for name, value in self._notes.items()]
        if self.total is not None and done < self.total:
            pace = rate or gone / seconds  # where all was there of late, all may be
            parts.append(f"eta {duration((self.total - done) / pace)}" if pace > 0 else "eta unknown")
        else:
            parts.append(f"took {duration(now - self._started)}")
        return " | ".join(parts)

    def _reached(self) -> int:
        done = self.done + self._ahead  # both may know of the same ones, for as long as nobody looks ahead again
        return done if self.total is None else max(self.done, min(done, self.total))

    def _see(self) -> None:
        """The rate is of late: what goes by for an hour, for it is there, says nothing of the rest."""
        now = self._clock()
        if now - self._seen[-1][0] >= _SHORTEST_SECONDS:
            self._seen.append((now, self._reached(), self._free))
        while len(self._seen) > _LEAST_SEEN and now - self._seen[1][0] >= _LATE_SECONDS:
            self._seen.popleft()


@contextmanager
def repeatedly(call: Callable[[], None], *, seconds: float) -> Iterator[None]:
    """Call it every so many seconds, by a thread, while the block runs."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(seconds):
            call()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def duration(seconds: float) -> str:
    """Seconds as people say them: `42 s`, `3.5 min`, `2.1 h`, `1.5 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.1f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"
