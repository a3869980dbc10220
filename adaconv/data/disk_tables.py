"""Tables on a scratch disk, for what is to be sorted and is too much for memory."""

import errno
import sqlite3
from collections.abc import Sequence
from pathlib import Path


class DiskTables:
    """SQLite in a file that nobody needs once the work is done, so nothing is done to survive a crash.

    Args:
        path: of the file.
        tables: statements that make them.
    """

    def __init__(self, path: Path, tables: str) -> None:
        self._path = path
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.executescript(f"PRAGMA journal_mode = off; PRAGMA synchronous = off; BEGIN; {tables}")

    def execute(self, statement: str, values: Sequence[str | int] = ()) -> sqlite3.Cursor:
        """Run one statement.

        Raises:
            OSError: the disk is full.
        """
        try:
            return self._connection.execute(statement, values)
        except sqlite3.OperationalError as error:
            raise OSError(
                errno.ENOSPC, f"{error}: about a kilobyte an image is needed; set TMPDIR", str(self._path)
            ) from None

    def close(self) -> None:
        self._connection.close()
