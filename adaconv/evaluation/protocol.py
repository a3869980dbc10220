"""The pictures that models are judged on: fixed once, and named by what they are."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adaconv.errors import UsageError
from adaconv.evaluation.metrics import VERSION
from adaconv.images import MAX_PIXELS, ImageError
from adaconv.stylize.inputs import Item, decode_picture, list_items, local_file, sha256_of, spread

_ID_DIGITS = 12

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exhibit:
    """A picture of the protocol: what it is called, the sha256 of its file, and its pixels, (3, S, S) uint8."""

    source: str
    sha256: str
    pixels: Tensor


@dataclass(frozen=True)
class Protocol:
    """Every content meets every style.

    `side`: of the square pictures, in pixels; `style_side`: at which styles are read; `judge`: fingerprint of the
    encoder that compares.
    """

    contents: tuple[Exhibit, ...]
    styles: tuple[Exhibit, ...]
    side: int
    style_side: int
    judge: str

    @property
    def id(self) -> str:
        """Scores can be compared where these digits are the same.

        They are of the files' bytes, the sizes, the judge and the definitions of the metrics.
        """
        return hashlib.sha256(json.dumps(self.described(), sort_keys=True).encode()).hexdigest()[:_ID_DIGITS]

    def described(self) -> dict[str, object]:
        """All that the id is made of."""
        return {
            "contents": [one.sha256 for one in self.contents],
            "styles": [one.sha256 for one in self.styles],
            "side": self.side,
            "style_side": self.style_side,
            "judge": self.judge,
            "metrics": VERSION,
        }


def read_protocol(
    content: Sequence[str],
    style: Sequence[str],
    *,
    contents: int,
    styles: int,
    side: int,
    style_side: int,
    judge: str,
) -> Protocol:
    """Pictures spread evenly over the sorted lists of what these sources hold.

    Args:
        content: sources as in `stylize.inputs`.
        style: the same.
        contents: at most so many of them.
        styles: at most so many of them.
        side: see `Protocol`.
        style_side: see `Protocol`.
        judge: see `Protocol`.

    Raises:
        UsageError: as `choose`; pictures cannot be read: all of them are named; one is there twice.
    """
    exhibits: list[list[Exhibit]] = []
    broken: list[str] = []
    for items in choose(content, style, contents=contents, styles=styles):
        exhibits.append([])
        for item in items:
            try:
                exhibits[-1].append(_exhibit(item, side))
            except ImageError as error:
                broken.append(f"{item.source} ({error})")
        _refuse_twins(exhibits[-1])
    if broken:
        raise UsageError(
            f"{len(broken)} pictures of the protocol cannot be read: {'; '.join(broken[:5])}; take them away, or "
            "choose others with --protocol.contents and --protocol.styles"
        )
    return Protocol(tuple(exhibits[0]), tuple(exhibits[1]), side, style_side, judge)


def choose(content: Sequence[str], style: Sequence[str], *, contents: int, styles: int) -> list[list[Item]]:
    """Which pictures a protocol takes; they are not read.

    Raises:
        UsageError: a source is not there, or holds too few to say anything of others.
    """
    chosen = [
        spread(list_items(content, flag="--content"), contents),
        spread(list_items(style, flag="--style"), styles),
    ]
    for flag, items in zip(("--content", "--style"), chosen, strict=True):
        if len(items) < 2:
            raise UsageError(f"{flag}: expected two pictures or more, found {items[0].source} alone")
    return chosen


def _refuse_twins(exhibits: list[Exhibit]) -> None:
    """A picture that is there twice would count for two."""
    seen: dict[str, str] = {}
    for one in exhibits:
        if one.sha256 in seen:
            raise UsageError(f"{seen[one.sha256]} and {one.source} are the same picture: a protocol takes each once")
        seen[one.sha256] = one.source


def open_exhibit(item: Item) -> tuple[Image.Image, str]:
    """A picture of the protocol as it is stored, and the sha256 of its file.

    Raises:
        ImageError: it cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = local_file(item, Path(folder))
        return decode_picture(path, max_pixels=MAX_PIXELS), sha256_of(path)


def _exhibit(item: Item, side: int) -> Exhibit:
    picture, digest = open_exhibit(item)
    if min(picture.size) < side:
        log.warning("%s is enlarged: it has %dx%d pixels, the protocol %d", item.source, *picture.size, side)
    return Exhibit(item.source, digest, _centre_square(picture, side))


def _centre_square(picture: Image.Image, side: int) -> Tensor:
    """(3, side, side) uint8: the middle of a picture whose shorter side is scaled to `side` pixels."""
    short = min(picture.size)
    left, top = (picture.width - short) / 2, (picture.height - short) / 2
    square = picture.resize((side, side), Image.Resampling.LANCZOS, box=(left, top, left + short, top + short))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)
