"""A part of the images that are listed: the same one wherever they lie and whatever order they come in.

Each image has a rank, a hash of the seed and its path. Those of the lowest ranks are taken, so a smaller subset is part
of a larger one, and what is added to a folder moves few of those that were taken before.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from adaconv.config.shard import SubsetConfig
from adaconv.data.disk_tables import DiskTables
from adaconv.data.sources import Found
from adaconv.errors import UsageError

_RANKS = 2**63  # what SQLite's integers hold


def rank_of(source: str, seed: int) -> int:
    """0 ... 2^63 - 1, from a path below what was given."""
    text = f"{seed}\0{source}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8]) % _RANKS


class Subset:
    """Takes images out of a listing, as configured; memory does not grow with either.

    Attributes:
        listed: images that it was shown.

    Args:
        config: how many are taken.
        folder: for a file that sorts them.
    """

    def __init__(self, config: SubsetConfig, folder: Path) -> None:
        self._config, self._path = config, folder / "subset.sqlite"
        self.listed = 0

    def of(self, found: Iterable[Found]) -> Iterator[Found]:
        """The images that are taken, one at a time.

        Raises:
            UsageError: there is none of them.
        """
        taken = 0
        for one in self._lowest(self._hit(found)):
            taken += 1
            yield one
        if self.listed and not taken:
            raise UsageError(f"--subset.fraction {self._config.fraction}: takes none of {self.listed} images; raise it")

    def recipe(self) -> dict[str, Any]:
        """What a version's recipe says of it, once the images were taken: nothing where all are."""
        chosen = self._config.model_dump(exclude_none=True)
        return {"subset": {**chosen, "of": self.listed}} if chosen.keys() - {"seed"} else {}

    def _hit(self, found: Iterable[Found]) -> Iterator[tuple[int, Found]]:
        """Each image of the fraction with its rank."""
        bound = _RANKS if self._config.fraction is None else int(self._config.fraction * _RANKS)
        for one in found:
            self.listed += 1
            rank = rank_of(one.source, self._config.seed)
            if rank < bound:
                yield rank, one

    def _lowest(self, ranked: Iterable[tuple[int, Found]]) -> Iterator[Found]:
        if self._config.limit is None and self._config.per_label is None:
            yield from (one for _, one in ranked)
            return
        with closing(DiskTables(self._path, "CREATE TABLE found (rank INTEGER, label TEXT, json TEXT);")) as tables:
            for rank, one in ranked:
                row = (rank, one.style or one.label, json.dumps(one))
                tables.execute("INSERT INTO found VALUES (?, ?, ?)", row)
            # A path may be there twice, in two sources: then the rest of what is known of a file tells which is first.
            taken = tables.execute(
                "SELECT json FROM (SELECT *, row_number() OVER (PARTITION BY label ORDER BY rank, json) AS place"
                " FROM found) WHERE place <= ? ORDER BY rank, json LIMIT ?",
                (self._config.per_label or sys.maxsize, self._config.limit or sys.maxsize),
            )
            for (text,) in taken:
                yield Found.from_json(json.loads(text))
