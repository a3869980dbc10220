"""The contract between stylization and its users: names, recipes and books of outputs.

    OUTPUT/
      images/<style>/<content>-<16 hex>.png   the hash is of content bytes, style pack, model and options
      styles/<style>-<16 hex>.safetensors     style packs
      index.parquet                           a row for every pair: done, skipped or failed, and why
      gallery.html                            the outputs as a grid, in one file
      result.json                             written last

An output is published whole as soon as it is made and its name says all that determines it: what exists is right.
"""

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, PngImagePlugin

from adaconv import storage

FORMAT = 1
RECIPE_KEY = "adaconv"  # of the PNG text that holds an output's recipe
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
INDEX = pa.schema(
    [
        ("output", pa.string()),
        ("state", pa.string()),
        ("reason", pa.string()),
        ("content", pa.string()),
        ("content_sha256", pa.string()),
        ("style", pa.string()),
        ("style_sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("seconds", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Recipe:
    """All that determines an output. No paths of machines and no secrets: it travels with the picture."""

    content: str
    content_sha256: str
    style: str
    style_sha256: str
    pack_digest: str
    model: str
    model_digest: str
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Path below the job's output: what determines the picture, behind a prefix for people."""
        made_of = [FORMAT, self.content_sha256, self.pack_digest, self.model_digest, dict(self.options)]
        digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
        return f"images/{slug(self.style)}/{slug(self.content)}-{digest}.png"

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **self.__dict__}, sort_keys=True)


def slug(source: str) -> str:
    """A readable, safe file name of at most 50 characters from a file's path: its stem without odd characters."""
    plain = re.sub(r"[^\w.-]+", "-", PurePosixPath(source).stem).strip("-.")
    return plain[:50] or "image"


def pack_name(style: str, digest: str) -> str:
    return f"styles/{slug(style)}-{digest[:16]}.safetensors"


def encode(image: Image.Image, recipe: Recipe) -> bytes:
    """PNG with its recipe: the same picture and recipe give the same bytes."""
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt(RECIPE_KEY, recipe.to_json())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=notes, compress_level=4)
    return buffer.getvalue()


def read_recipe(data: bytes) -> dict[str, Any] | None:
    """The recipe of an output; None where the picture carries none."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        text = getattr(image, "text", {}).get(RECIPE_KEY)
    return json.loads(text) if text else None


def is_whole(uri: str) -> bool:
    """An output is there to its last byte."""
    if not storage.exists(uri):
        return False
    size = storage.size_of(uri)
    return size > len(_PNG_END) and storage.read_range(uri, size - len(_PNG_END), len(_PNG_END)) == _PNG_END


def publish_index(root: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the books: a row for every pair."""
    table = pa.Table.from_pylist([{name: row[name] for name in INDEX.names} for row in rows], schema=INDEX)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    uri = storage.join(root, "index.parquet")
    storage.publish_bytes(uri, buffer.getvalue())
    return uri
