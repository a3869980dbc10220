"""Where tasks tell how far they are. An actor's process imports this module, and Ray Data would take it seconds."""

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ray

_TELL_SECONDS = 2.0  # a message costs the two processes some milliseconds, and status lines come every five at most


class Board:
    """What tasks have done so far, by task: one that is started again begins at nothing."""

    def __init__(self) -> None:
        self._of_task: dict[str, tuple[int, int, int]] = {}

    def clear(self) -> None:
        self._of_task.clear()

    def set(self, task: str, images: int, read_bytes: int, refused: int) -> None:
        self._of_task[task] = (images, read_bytes, refused)

    def forget(self, task: str) -> None:
        """What it did is counted by other means."""
        self._of_task.pop(task, None)

    def totals(self) -> tuple[int, int, int]:
        images, read_bytes, refused = zip((0, 0, 0), *self._of_task.values(), strict=True)
        return sum(images), sum(read_bytes), sum(refused)


class Teller:
    """A task's side of the board; tells it every few seconds."""

    def __init__(self, board: "ray.actor.ActorHandle", task: str) -> None:
        self._board, self._task = board, task
        self._done = (0, 0, 0)
        self._last = time.monotonic()

    def __call__(self, images: int, read_bytes: int, refused: int) -> None:
        self._done = (self._done[0] + images, self._done[1] + read_bytes, self._done[2] + int(refused))
        if time.monotonic() - self._last >= _TELL_SECONDS:
            self.close()

    def close(self) -> None:
        self._last = time.monotonic()
        self._board.set.remote(self._task, *self._done)
