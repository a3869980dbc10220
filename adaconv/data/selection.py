"""Which images are meant by key, label, artist or source: to go from a version, or to get into none.

A list of what is to get into none is a text file. A line names images by one thing; one that begins with # is a note:

    artist:claude-monet
    label:Impressionism/late             folders below it as well
    sha256:…                             64 hex digits, of the file
    source:Impressionism/*_nude-*.jpg    * and ? as in a shell; all else stands for itself
"""

import difflib
import fnmatch
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaconv import storage
from adaconv.config.dataset import RemoveConfig
from adaconv.config.trace import TraceConfig
from adaconv.data.manifest import Row
from adaconv.data.sources import composed
from adaconv.errors import UsageError

log = logging.getLogger(__name__)

FLAGS = ("key", "label", "artist", "source_pattern")
_FEW_VALUES = ("label", "artist")  # so that the nearest is found; of keys and sources there are as many as images
_TOLD = 5  # criteria, or lines, that a message names
_FIELDS = {"artist": "artist", "label": "label", "sha256": "key", "source": "source_pattern"}  # by a line's first word
_WORDS = {field: word for word, field in _FIELDS.items()}
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Criterion:
    """One thing that rows are chosen by: `field` of FLAGS, and its value.

    The same letters may be written by other characters, as names of files are on macOS: values are composed (NFC).
    """

    field: str
    value: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", composed(self.value))

    def as_flag(self) -> str:
        return f"--{self.field.replace('_', '-')} {self.value}"

    def as_line(self) -> str:
        return f"{_WORDS[self.field]}:{self.value}"


class Selector:
    """Chooses rows, and counts what by, for a criterion that chose none may be mistyped.

    Attributes:
        counts: rows that each criterion admitted.
    """

    def __init__(self, criteria: Iterable[Criterion]) -> None:
        self.counts = dict.fromkeys(criteria, 0)
        self._place = {criterion: number for number, criterion in enumerate(self.counts)}
        # A list of what is to go may have thousands of keys: they are looked up, only patterns are tried one by one.
        self._named = {(one.field, one.value): one for one in self.counts}
        patterns = [one for one in self.counts if one.field == "source_pattern"]
        # Only * and ? say something else than themselves: [1] is in many a name of a copy.
        self._patterns = [(re.compile(fnmatch.translate(one.value.replace("[", "[[]"))), one) for one in patterns]
        self._known: dict[str, set[str]] = {one.field: set() for one in self.counts if one.field in _FEW_VALUES}

    def first(self, row: Row) -> Criterion | None:
        """The first criterion that admits a row."""
        for field, values in self._known.items():
            values.add(composed(row[field]))
        source = composed(row["source"])
        admitted = [self._named[name] for name in _names_of(row) if name in self._named]
        admitted += [criterion for pattern, criterion in self._patterns if pattern.match(source)]
        for criterion in admitted:
            self.counts[criterion] += 1
        return min(admitted, key=lambda criterion: self._place[criterion], default=None)

    def unused(self, said: Callable[[Criterion], str], among: Iterable[Criterion]) -> str:
        """Those that admitted nothing, with the nearest label or artist there is; empty if there is none."""
        unused = [criterion for criterion in dict.fromkeys(among) if not self.counts[criterion]]
        told = [f"{said(one)}: no image has it{self._nearest(one)}" for one in unused[:_TOLD]]
        return "; ".join(told) + (f"; and {len(unused) - _TOLD} more" if len(unused) > _TOLD else "")

    def _nearest(self, criterion: Criterion) -> str:
        near = difflib.get_close_matches(criterion.value, self._known.get(criterion.field, ()), n=1)
        return f"; did you mean '{near[0]}'?" if near else ""


def _names_of(row: Row) -> Iterator[tuple[str, str]]:
    """What a row is named by, but for patterns: field and value."""
    yield "key", row["key"]
    yield "key", row["source_sha256"]
    yield "artist", composed(row["artist"])
    parts = composed(row["label"]).split("/")
    yield from (("label", "/".join(parts[:depth])) for depth in range(1, len(parts) + 1))


def criteria_of(config: RemoveConfig | TraceConfig) -> list[Criterion]:
    return [Criterion(field, value) for field in FLAGS for value in getattr(config, field)]


def keys_to_remove(
    rows: Iterable[Row], criteria: Sequence[Criterion], exclusions: Sequence[Criterion] = ()
) -> dict[str, str]:
    """Key -> reason of each image that a criterion names, whichever of its copies it admits; none if all are gone.

    Args:
        rows: of the version.
        criteria: each has to name something.
        exclusions: of a list, which may name what is not there.

    Raises:
        UsageError: a criterion admits nothing, with the nearest label or artist there is.
    """
    keys: dict[str, str] = {}
    selector = Selector([*criteria, *exclusions])
    for row in rows:
        first = selector.first(row) if row["state"] != "quarantined" else None
        if first and row["state"] != "excluded":  # else it was removed before
            keys.setdefault(row["key"], f"removed_by_{first.field}")
    if unused := selector.unused(Criterion.as_flag, criteria):
        raise UsageError(unused)
    if unused := selector.unused(Criterion.as_line, exclusions):
        log.warning("warning: %s", unused)
    return keys


def read_exclusions(uri: str | None) -> list[Criterion]:
    """What a list names, sorted; nothing where there is no list.

    Raises:
        UsageError: it is not there, is no text, or has lines that name nothing.
    """
    if uri is None:
        return []
    try:
        lines = storage.read_bytes(storage.absolute(uri)).decode("utf-8-sig").split("\n")
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(f"--exclude {uri}: expected a text file, found none there") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"--exclude {uri}: expected text in UTF-8, found other bytes ({error})") from None
    criteria, wrong = set(), []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        word, _, value = (part.strip() for part in line.partition(":"))
        value = value.lower() if word == "sha256" else value
        if word not in _FIELDS or not value or (word == "sha256" and not _SHA256.fullmatch(value)):
            wrong.append(f"line {number}: {line[:100]!r}")
        else:
            criteria.add(Criterion(_FIELDS[word], value))
    if wrong:
        more = f" and {len(wrong) - _TOLD} more" if len(wrong) > _TOLD else ""
        raise UsageError(
            f"--exclude {uri}: expected artist:NAME, label:NAME, sha256:64 hex digits or source:PATTERN; found "
            f"{', '.join(wrong[:_TOLD])}{more}"
        )
    return sorted(criteria, key=Criterion.as_line)


def without(recipe: Mapping[str, Any], exclusions: Sequence[Criterion]) -> dict[str, Any]:
    """The recipe of a version that is made with a list: its content is part of it, by hash."""
    plain = {name: value for name, value in recipe.items() if name != "exclude"}
    if not exclusions:
        return plain
    lines = json.dumps([one.as_line() for one in exclusions]).encode()
    return {**plain, "exclude": {"criteria": len(exclusions), "sha256": hashlib.sha256(lines).hexdigest()}}
