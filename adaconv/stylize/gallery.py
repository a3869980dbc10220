"""A job's outputs as one HTML file: thumbnails are inside, full sizes linked."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

_PAGE = (Path(__file__).parent / "gallery.html").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Picture:
    """`thumbnail`: JPEG bytes. `title`: shown below or on hover. `link`: relative path of the full size, if any."""

    thumbnail: bytes
    title: str
    link: str | None = None


def render(
    *,
    title: str,
    facts: Mapping[str, str],
    contents: Sequence[Picture],
    styles: Sequence[Picture],
    cells: Mapping[tuple[int, int], Picture],
    note: str = "",
) -> str:
    """The page.

    Args:
        title: heading.
        facts: lines below it, such as the model and the books.
        contents: rows.
        styles: columns.
        cells: stylized pictures by (row, column); one that is not there is shown as failed.
        note: a sentence above the grid, such as what was left out.
    """
    header = "".join(f'<th scope="col">{_img(style, "style")}</th>' for style in styles)
    rows = []
    for down, content in enumerate(contents):
        row = [f'<th scope="row">{_img(content, "content")}</th>']
        for across in range(len(styles)):
            cell = cells.get((down, across))
            row.append(f"<td>{_img(cell, 'stylized') if cell else '<span class=failed>failed</span>'}</td>")
        rows.append(f"<tr>{''.join(row)}</tr>")
    listed = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    parts = {
        "{{title}}": html.escape(title),
        "{{facts}}": listed,
        "{{note}}": html.escape(note),
        "{{header}}": header,
        "{{rows}}": "\n".join(rows),
    }
    page = _PAGE
    for mark, value in parts.items():
        page = page.replace(mark, value)
    return page


def _img(picture: Picture, kind: str) -> str:
    data = base64.b64encode(picture.thumbnail).decode()
    title = html.escape(picture.title, quote=True)
    img = f'<img class="{kind}" src="data:image/jpeg;base64,{data}" alt="{title}" title="{title}" loading="lazy">'
    return f'<a href="{quote(picture.link)}">{img}</a>' if picture.link else img
