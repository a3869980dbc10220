"""One status line every few seconds for long work: how far, how fast, how long still. A job log is no terminal."""

import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)


class Progress:
    """Counts work done and says so, at most every `interval_seconds`.

    The line reads `stylize 120/1000 | 12 % | 8.3 images/s | 1 failed | eta 1.8 min`.
    """

    def __init__(
        self,
        what: str,
        *,
        total: int | None = None,
        unit: str = "images",
        done: int = 0,
        interval_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        emit: Callable[[str], None] = log.info,
    ) -> None:
        self._what, self.total, self._unit = what, total, unit
        self._interval_seconds, self._clock, self._emit = interval_seconds, clock, emit
        self.done = self._done_at_start = done
        self._started = self._last_line = clock()
        self._notes: dict[str, str] = {}

    def advance(self, count: int = 1, **notes: object) -> None:
        """Add `count` units of work; `notes` stay on the line until they change (`failed=3` reads `3 failed`)."""
        self.done += count
        self._notes.update({name: str(value) for name, value in notes.items()})
        if self._clock() - self._last_line >= self._interval_seconds:
            self._last_line = self._clock()
            self._emit(self.line())

    def close(self) -> None:
        """Emit the last line, whatever the interval."""
        self._emit(self.line())

    def line(self) -> str:
        """The status as of now."""
        seconds = self._clock() - self._started
        rate = (self.done - self._done_at_start) / seconds if seconds > 0 else 0.0
        parts = [f"{self._what} {self.done}" + (f"/{self.total}" if self.total is not None else "")]
        if self.total:
            parts.append(f"{100 * self.done / self.total:.0f} %")
        parts.append(f"{rate:.3g} {self._unit}/s")
        parts += [f"{value} {name.replace('_', ' ')}" for name, value in self._notes.items()]
        if self.total is not None and self.done < self.total:
            parts.append(f"eta {duration((self.total - self.done) / rate)}" if rate > 0 else "eta unknown")
        else:
            parts.append(f"took {duration(seconds)}")
        return " | ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as people say them: `42 s`, `3.5 min`, `2.1 h`, `1.5 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.1f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"
