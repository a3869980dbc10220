"""What became of every pair of a job, in memory that does not grow with the pairs."""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adaconv import storage


class Books:
    """Rows of the index, kept on disk in the order in which they come, and read in that of the plan.

    `states`: how many pairs ended in each. `failures`: what went wrong, each once.

    Args:
        path: of the file that holds the rows.
        pairs: of the plan, whose numbers are 0 ... pairs - 1.
    """

    def __init__(self, path: Path, pairs: int) -> None:
        self.states: Counter[str] = Counter()
        self.failures: set[str] = set()
        self._path = path
        self._file = path.open("w+b")
        self._places = np.full(pairs, -1, np.int64)

    def __enter__(self) -> "Books":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # of rows that nobody will read; a full disk has been told of, by its path
            self._file.close()

    def enter(self, number: int, row: Mapping[str, Any]) -> None:
        """Note what became of a pair."""
        assert self._places[number] < 0, "a pair ends in the books once"
        self.states[row["state"]] += 1
        if row["state"] == "failed":
            self.failures.add(f"{row['reason']} ({culprit(row)})")
        self._places[number] = self._file.tell()
        with storage.full_disk_named(str(self._path)):
            self._file.write(json.dumps(row).encode() + b"\n")

    def rows(self) -> Iterator[dict[str, Any]]:
        """Each pair's, by its number."""
        assert (self._places >= 0).all(), "every pair ends in the books"
        with storage.full_disk_named(str(self._path)):
            self._file.flush()
        for place in map(int, self._places):
            self._file.seek(place)
            yield json.loads(self._file.readline())


def culprit(row: Mapping[str, Any]) -> str:
    """Of a failed pair: the picture that its reason is about."""
    return str(row["style"] if row["reason"].startswith("style") else row["content"])
