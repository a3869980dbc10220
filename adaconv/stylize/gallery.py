"""A job's outputs as one HTML file: thumbnails are inside, full sizes linked; nothing is fetched from anywhere."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from adaconv import pages

_PAGE = (Path(__file__).parent / "gallery.html").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Picture:
    """`thumbnail`: JPEG bytes, or nothing. `title`: shown. `link`: relative path of the full size, if any."""

    thumbnail: bytes
    title: str
    link: str | None = None


@dataclass(frozen=True)
class Failure:
    """Why an output is not there."""

    reason: str


def render(
    *,
    title: str,
    facts: Mapping[str, str],
    contents: Sequence[Picture],
    styles: Sequence[Picture],
    cells: Mapping[tuple[int, int], Picture | Failure],
    note: str = "",
) -> str:
    """The page.

    Args:
        title: heading.
        facts: lines below it, such as the model and the books.
        contents: rows.
        styles: columns.
        cells: outputs by (row, column); a place without one stays empty.
        note: a sentence above the grid, such as what was left out.
    """
    of_row: dict[int, dict[int, Any]] = {}
    for (row, column), cell in cells.items():
        of_row.setdefault(row, {})[column] = {"failed": cell.reason} if isinstance(cell, Failure) else _told(cell)
    rows = (
        f'<script type="application/json" class="row-data">'
        f"{pages.script_json({**_told(content), 'cells': of_row.get(row, {})})}</script>"
        for row, content in enumerate(contents)
    )
    parts = {
        "title": html.escape(title),
        "facts": pages.facts(facts),
        "note": html.escape(note),
        "columns": pages.script_json([_told(style) for style in styles]),
        "rows": "\n".join(rows),
    }
    return pages.fill(_PAGE, parts)


def _told(picture: Picture) -> dict[str, str]:
    told = {"title": picture.title, "image": base64.b64encode(picture.thumbnail).decode()}
    return told if picture.link is None else {**told, "link": quote(picture.link)}
