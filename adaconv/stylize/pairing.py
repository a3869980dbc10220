"""Which contents meet which styles, and how: pure functions of two lists."""

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from adaconv.data.sources import composed
from adaconv.errors import UsageError
from adaconv.stylize.tables import read_table

_TOLD = 10  # wrong rows
_COMPARED = 10_000  # names that the nearest is looked for among
_NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Pair:
    """Indexes into the lists of contents and styles; `options` are what this pair alone has."""

    content: int
    style: int
    options: Mapping[str, Any] = field(default_factory=lambda: _NO_OPTIONS)  # one for a million pairs


def pair_up(
    how: str,
    contents: Sequence[str],
    styles: Sequence[str],
    *,
    seed: int = 0,
    check: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda options: options,
) -> list[Pair]:
    """The pairs of a job, content by content.

    Args:
        how: `grid`, `zip`, `random:K`, or a .csv or .parquet file with columns `content`, `style` and options.
        contents: their names.
        styles: their names.
        seed: of `random:K`, where each content's styles depend on nothing but the seed and its place.
        check: makes a row's options values that fit, or raises UsageError.

    Raises:
        UsageError: lists or file do not fit.
    """
    if how == "grid":
        return [Pair(content, style) for content in range(len(contents)) for style in range(len(styles))]
    if how == "zip":
        if len(contents) != len(styles):
            raise UsageError(f"--pairs zip: expected as many styles as contents, found {len(contents)}, {len(styles)}")
        return [Pair(index, index) for index in range(len(contents))]
    if how.startswith("random:"):
        count = int(how.removeprefix("random:"))
        if count > len(styles):
            raise UsageError(f"--pairs {how}: expected at least {count} styles, found {len(styles)}")
        return [
            Pair(content, int(style))
            for content in range(len(contents))
            for style in sorted(_draw(len(styles), count, seed, content))
        ]
    return _pairs_of_file(how, contents, styles, check)


def _draw(total: int, count: int, seed: int, place: int) -> list[int]:
    """`count` of `total` by raw Philox words, which numpy keeps the same for ever, unlike its own shuffles."""
    words = np.random.Philox(key=[seed, place]).random_raw(total)
    # Only the least are sorted: to sort 81,000 styles takes ten times as long as to find a few of them.
    least = np.flatnonzero(words <= np.partition(words, count - 1)[count - 1])
    chosen: list[int] = least[np.argsort(words[least], kind="stable")][:count].tolist()
    return chosen


def _pairs_of_file(
    uri: str,
    contents: Sequence[str],
    styles: Sequence[str],
    check: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> list[Pair]:
    places = {"content": _places(contents), "style": _places(styles)}
    names = {"content": contents, "style": styles}

    def found(where: str, name: str, cell: Any) -> int:
        value = "" if cell is None else composed(str(cell))
        value = value if value in places[name] else value.strip()
        if value not in places[name]:
            near = difflib.get_close_matches(value, names[name][:_COMPARED], n=1) or names[name][:1]
            example = f", such as {near[0]!r}" if near else ""
            raise UsageError(
                f"{where}: expected the name of a {name} that --{name} holds and --limit-{name}s leaves{example}; "
                f"found {value!r}"
            )
        place = places[name][value]
        if place is None:
            raise UsageError(
                f"{where}: more than one {name} is called {value!r}; give the folder that theirs lie in as --{name}, "
                "and their names have these before"
            )
        return place

    pairs: list[Pair] = []
    seen: set[tuple[int, int, str]] = set()
    wrong: list[str] = []
    for where, row in read_table(uri, flag="--pairs"):
        if any(";" in column for column in row):
            raise UsageError(f"{where}: expected columns parted by commas, found {next(iter(row))!r}")
        row = {str(column).strip(): cell for column, cell in row.items()}
        if not places.keys() <= row.keys():
            raise UsageError(f"{where}: expected columns content and style, found {', '.join(row)}")
        try:
            content, style = (found(where, name, row.pop(name)) for name in ("content", "style"))
            cells = [(key, value.strip() if isinstance(value, str) else value) for key, value in row.items()]
            options = check({key: value for key, value in cells if value not in (None, "")})
        except UsageError as error:
            told = str(error)
            wrong.append(told if told.startswith(where) else f"{where}: {told}")
            if len(wrong) == _TOLD:
                break
            continue
        key = (content, style, json.dumps(dict(options), sort_keys=True))
        if key not in seen:  # the same output twice is one
            seen.add(key)
            pairs.append(Pair(content, style, options))
    if wrong:
        raise UsageError("\n".join(wrong))
    return sorted(pairs, key=lambda pair: pair.content)


def _places(names: Sequence[str]) -> dict[str, int | None]:
    """Name to index; None for a name that several have."""
    places: dict[str, int | None] = {}
    for index, name in enumerate(map(composed, names)):
        places[name] = None if name in places else index
    return places
