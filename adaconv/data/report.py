"""A dataset version on one HTML page that needs no other file: books, reasons, sizes, what looks alike, pictures."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from adaconv import pages, storage
from adaconv.data.manifest import IN_SHARDS, STATES, DatasetVersion, Row
from adaconv.data.similar import Pair, similar_pairs
from adaconv.images import encode_jpeg

_PAGE = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
_THUMBNAIL_SIDE = 112
_EXAMPLES = 8  # of a reason
_LABELS, _PAIRS = 40, 24
_SIDES = (0, 128, 192, 256, 320, 384, 448, 512, 513, 1024, 4096)
_ASPECTS = (0, 0.4, 0.6, 0.7, 0.8, 0.9, 1.1, 1.25, 1.4, 1.6, 2, 2.5, 100)


def render(version: DatasetVersion, *, distance: int, sheet: int) -> str:
    """The page.

    Args:
        version: what it is about.
        distance: bits in which the perceptual hashes of images that look alike may differ.
        sheet: images of the contact sheet.
    """
    places_of = ["key", "source", "shard", "offset", "size"]
    samples = version.samples([*places_of, "width", "height", "phash", "label"])
    places = samples.select(places_of)
    width, height = (samples[name].to_numpy() for name in ("width", "height"))
    pairs = similar_pairs(samples["phash"].to_numpy(), distance=distance)
    parts = {
        "title": f"Dataset version {version.version}",
        "facts": _facts(version),
        "books": _books(version.books),
        "reasons": _reasons(version),
        "sizes": _histogram(np.minimum(width, height), _SIDES, what="images by shorter side"),
        "aspects": _histogram(width / np.maximum(height, 1), _ASPECTS, what="images by aspect"),
        "labels": _labels(samples),
        "similar": _similar(version, places, pairs, distance),
        "sheet": "".join(_figure_of(version, row) for row in _evenly(places, sheet)),
    }
    return pages.fill(_PAGE, parts)


def _facts(version: DatasetVersion) -> str:
    recipe = {name: value for name, value in version.recipe.items() if name != "codecs"}
    facts = {
        "root hash": version.root_hash,
        "parent": version.parent or "none",
        "shards": f"{len(version.shards)}, {sum(shard.bytes for shard in version.shards) / 1e6:,.1f} MB",
        "recipe": ", ".join(f"{name} {value}" for name, value in recipe.items()),
        "codecs": ", ".join(f"{name} {value}" for name, value in version.recipe["codecs"].items()),
    }
    return pages.facts(facts)


def _books(books: Mapping[str, Any]) -> str:
    rows = [(state, books[state]) for state in STATES]
    lines = [f'<tr><td>{state}</td><td class="n">{count:,}</td></tr>' for state, count in rows]
    lines.append(f'<tr class="sum"><td>found</td><td class="n">{books["found"]:,}</td></tr>')
    return f"<table>{''.join(lines)}</table>"


def _reasons(version: DatasetVersion) -> str:
    """Each reason with its count and a few images: out of the shards, or as the manifest keeps the refused ones."""
    examples: dict[str, list[Row]] = {reason: [] for reason in version.books["reasons"]}
    for row in version.rows():
        for reason in filter(None, row["reason"].split(",")):
            if len(examples[reason]) < _EXAMPLES:
                examples[reason].append(row)
    parts = []
    for reason, count in sorted(version.books["reasons"].items(), key=lambda item: (-item[1], item[0])):
        state = examples[reason][0]["state"]
        figures = "".join(_figure_of(version, row) for row in examples[reason])
        heading = f"{html.escape(reason)} <small>{count:,} {html.escape(state)}</small>"
        parts.append(f'<h3>{heading}</h3><div class="pictures">{figures}</div>')
    return "".join(parts) or "<p>Every image was kept as it was.</p>"


def _labels(samples: pa.Table) -> str:
    counts = samples["label"].value_counts().to_pylist()
    counts.sort(key=lambda item: (-item["counts"], item["values"]))
    lines = [
        f'<tr><td>{html.escape(item["values"]) or "(none)"}</td><td class="n">{item["counts"]:,}</td></tr>'
        for item in counts[:_LABELS]
    ]
    more = f"<p>and {len(counts) - _LABELS} more</p>" if len(counts) > _LABELS else ""
    return f"<table>{''.join(lines)}</table>{more}"


def _similar(version: DatasetVersion, places: pa.Table, pairs: Sequence[Pair], distance: int) -> str:
    if not pairs:
        return f"<p>No two images differ in {distance} or fewer of the 64 bits of their perceptual hashes.</p>"
    shown = []
    for pair in pairs[:_PAIRS]:
        both = [places.slice(row, 1).to_pylist()[0] for row in (pair.first, pair.second)]
        shown.append(f'<div class="pair">{"".join(_figure_of(version, row) for row in both)}</div>')
    said = f"{len(pairs):,} links of {distance} or fewer of the 64 bits of perceptual hashes join all that look alike"
    return f'<p>{said}; the shortest:</p><div class="pictures">{"".join(shown)}</div>'


def _evenly(places: pa.Table, count: int) -> Iterable[Row]:
    total = len(places)
    rows = [number * total // count for number in range(count)] if count < total else range(total)
    return (places.slice(row, 1).to_pylist()[0] for row in rows)


def _figure_of(version: DatasetVersion, row: Row) -> str:
    caption = html.escape(row["source"])
    detail = html.escape(row.get("detail") or row["key"], quote=True)
    in_shard = row.get("state", "kept") in IN_SHARDS
    thumbnail = _thumbnail(version, row) if in_shard else row["thumbnail"]
    if thumbnail:
        picture = _img(thumbnail)
    elif in_shard:
        picture = '<div class="unseen">damaged: see verify</div>'
    else:
        picture = '<div class="unseen">not shown</div>'
        caption += f"<br>{detail}"
    return f'<figure title="{detail}">{picture}<figcaption>{caption}</figcaption></figure>'


def _thumbnail(version: DatasetVersion, row: Row) -> str | None:
    """A small JPEG of a sample, in base64; None where the shard is gone or damaged: `verify` says how."""
    try:
        data = storage.read_range(version.shard_uri(row["shard"]), row["offset"], row["size"])
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            image.draft("RGB", (2 * _THUMBNAIL_SIDE, 2 * _THUMBNAIL_SIDE))
            small = image.convert("RGB")
    except ConnectionError:
        raise
    except (OSError, SyntaxError, ValueError):
        return None
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    return base64.b64encode(encode_jpeg(small, quality=80)).decode()


def _img(jpeg: str) -> str:
    return f'<img src="data:image/jpeg;base64,{jpeg}" alt="" loading="lazy">'


def _histogram(values: Any, edges: Sequence[float], *, what: str) -> str:
    """Bars, one below the other; a bin holds lower edge <= value < upper edge."""
    counts, _ = np.histogram(values, edges)
    most = max(1, counts.max())
    lines = []
    for row, (count, low, high) in enumerate(zip(counts, edges, edges[1:], strict=False)):
        y = 18 * row
        name = f"{low:g}" if high - low == 1 else f"{low:g} to {high:g}"
        lines.append(
            f'<text x="90" y="{y + 13}" text-anchor="end">{name}</text>'
            f'<rect x="98" y="{y + 2}" width="{400 * count / most:.1f}" height="14"/>'
            f'<text x="{104 + 400 * count / most:.1f}" y="{y + 13}">{count:,}</text>'
        )
    return f'<svg width="600" height="{18 * len(counts)}" role="img" aria-label="{what}">{"".join(lines)}</svg>'
