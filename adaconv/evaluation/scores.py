"""A model on a protocol: every pair made and measured, content by content, so that what was broken off goes on."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from adaconv import storage
from adaconv.evaluation.metrics import METRICS, OF_PAIRS, Judge, compare, identity
from adaconv.evaluation.protocol import Exhibit, Protocol
from adaconv.images import encode_jpeg, to_float, to_uint8
from adaconv.stylize.style_pack import StylePack
from adaconv.stylize.stylizer import Stylizer

SHOWN = 6  # contents and styles whose outputs the report shows
_SHOWN_SIDE = 160
_BATCH = {"cpu": 1, "cuda": 8}  # styles that a content is decoded with at once
_FLAT = 1e-6  # deviation of a picture of one colour
_LEAST_CONTRAST, _LEAST_SPREAD, _MOST_BETWEEN_TILES = 0.1, 1 / 255, 2 / 255

Told = Callable[[int], None]  # pairs since it was last called


@dataclass(frozen=True)
class Scores:
    """What a model got on a protocol.

    `of`: metric -> scores (contents, styles), float64; `identity` has one column. `defects`: what is wrong with it by
    itself. `shown`: (content, style) -> a small JPEG. `digest`: of the model's weights.
    """

    model: str
    of: Mapping[str, NDArray[np.float64]]
    defects: tuple[str, ...]
    shown: Mapping[tuple[int, int], bytes]
    digest: str = ""


class Evaluation:
    """A protocol and a judge, on a device.

    Args:
        protocol: the pictures.
        judge: compares them.
        device: `cpu` or `cuda`.
        output: folder or s3://bucket/prefix that keeps what was measured: a file for each content.
    """

    def __init__(self, protocol: Protocol, judge: Judge, *, device: str, output: str) -> None:
        self.protocol, self._judge, self._device, self._output = protocol, judge, device, output
        self._styles = [judge.look(self._pixels(one)).as_style() for one in protocol.styles]

    def unchanged(self, told: Told = lambda pairs: None) -> Scores:
        """Of the contents as they are: what a metric says of doing nothing."""
        of: dict[str, list[list[float]]] = {name: [] for name in METRICS}
        for exhibit in self.protocol.contents:
            look = self._judge.look(self._pixels(exhibit))
            pairs = [compare(look, look, style) for style in self._styles]
            for name in OF_PAIRS:
                of[name].append([pair[name] for pair in pairs])
            of["identity"].append([0.0])
            told(len(pairs))
        return Scores("the contents, unchanged", {name: np.array(rows) for name, rows in of.items()}, (), {})

    def scores(self, model: str, stylizer: Stylizer, told: Told = lambda pairs: None) -> Scores:
        """Of a model; contents that were measured before are read from where they are kept.

        Args:
            model: its name, for people.
            stylizer: on the same device.
            told: is told of each content's pairs.
        """
        packs = [
            stylizer.style_pack(one.pixels, side=self.protocol.style_side, source_sha256=one.sha256)
            for one in self.protocol.styles
        ]
        made_by = repr((stylizer.info.digest, stylizer.info.settings, self._device))
        name = f"{self.protocol.id}-{hashlib.sha256(made_by.encode()).hexdigest()[:16]}"
        folder = storage.join(self._output, "scores", name)
        there = {storage.name_of(uri) for uri in storage.list_files(folder)}
        rows = []
        for number, content in enumerate(self.protocol.contents):
            file = f"{number:05d}.json"
            if file in there:
                row = json.loads(storage.read_bytes(storage.join(folder, file)))
            else:
                row = self._row(content, stylizer, packs, shown=SHOWN if number < SHOWN else 0)
                storage.publish_bytes(storage.join(folder, file), json.dumps(row).encode())
            rows.append(row)
            told(len(packs))
        of = {name: np.array([row["of"][name] for row in rows], dtype=np.float64) for name in rows[0]["of"]}
        defects = _defects(of, apart=self._between_tiles(stylizer, packs[0]))
        shown = {
            (number, style): base64.b64decode(jpeg)
            for number, row in enumerate(rows)
            for style, jpeg in enumerate(row["shown"])
        }
        return Scores(model, {name: of[name] for name in METRICS}, tuple(defects), shown, stylizer.info.digest)

    @torch.inference_mode()
    def _row(self, exhibit: Exhibit, stylizer: Stylizer, packs: list[StylePack], *, shown: int) -> dict[str, Any]:
        """What is measured of a content with every style, and small JPEGs of the first outputs."""
        pixels = self._pixels(exhibit)
        content = self._judge.look(pixels)
        own = stylizer.style_pack(pixels, side=self.protocol.style_side)
        if stylizer.tile_of(self.protocol.side, self.protocol.side) is None:
            made = stylizer.stylize_all(pixels, [*packs, own], batch_size=_BATCH[stylizer.device])
        else:
            made = (stylizer.stylize(pixels, pack) for pack in (*packs, own))
        *outputs, itself = made
        pairs = [
            compare(self._judge.look(output), content, style)
            for output, style in zip(outputs, self._styles, strict=True)
        ]
        of = {name: [pair[name] for pair in pairs] for name in OF_PAIRS}
        of["identity"] = [identity(itself, pixels)]
        of["finite"] = [float(one.isfinite().all()) for one in outputs]
        of["contrast"] = [(_contrast(one) / _contrast(pixels).clamp_min(_FLAT)).item() for one in outputs]
        of["spread"] = [torch.cat(outputs).std(dim=0, correction=0).mean().item()]
        return {"of": of, "shown": [base64.b64encode(thumbnail(one[0])).decode() for one in outputs[:shown]]}

    def _between_tiles(self, stylizer: Stylizer, pack: StylePack) -> float:
        """The largest difference of the first content, 0 to 1: between its whole frame, or the largest tiles that there
        is memory for, and tiles of half their side.
        """
        content, side = to_float(self.protocol.contents[0].pixels), self.protocol.side
        largest = stylizer.tile_of(side, side)
        first, other = (stylizer.stylize(content, pack, tile=tile) for tile in (largest, (largest or side) // 16 * 8))
        return (first - other).abs().max().item()

    def _pixels(self, exhibit: Exhibit) -> Tensor:
        return to_float(exhibit.pixels)[None].to(self._device)


def _contrast(picture: Tensor) -> Tensor:
    """Deviation of the values of each channel of (1, 3, H, W), on average."""
    return picture.std(dim=(-2, -1)).mean()


def thumbnail(pixels: Tensor) -> bytes:
    """A small JPEG of (3, H, W) in [0, 1]; black where it is no number."""
    picture = Image.fromarray(to_uint8(pixels.nan_to_num(0.0)))
    picture.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    return encode_jpeg(picture, quality=85)


def table_of(scores: list[Scores], protocol: Protocol) -> pa.Table:
    """A row for each model and pair: names, and a column for each metric."""
    rows = [
        {"model": one.model, "content": content.source, "style": style.source}
        | {name: float(one.of[name][c, s if name in OF_PAIRS else 0]) for name in METRICS}
        for one in scores
        for c, content in enumerate(protocol.contents)
        for s, style in enumerate(protocol.styles)
    ]
    return pa.Table.from_pylist(rows)


def _defects(of: Mapping[str, NDArray[np.float64]], *, apart: float) -> list[str]:
    """What no comparison is needed for."""
    broken = int((of["finite"] == 0).sum())
    if broken:
        return [f"{broken} of {of['finite'].size} outputs hold values that are no numbers"]
    defects = [f"{name} is no number" for name in METRICS if not np.isfinite(of[name]).all()]
    contrast = float(np.median(of["contrast"]))
    if not contrast >= _LEAST_CONTRAST:
        defects.append(f"the outputs are grey: their contrast is {contrast:.2f} of the contents'")
    spread = float(of["spread"].mean())
    if of["finite"].shape[1] > 1 and not spread >= _LEAST_SPREAD:
        defects.append(f"the outputs do not depend on the style: they differ by {255 * spread:.2f} of 255 levels")
    if not apart <= _MOST_BETWEEN_TILES:
        defects.append(f"made in tiles, a picture is another one: they differ by {255 * apart:.1f} of 255 levels")
    return defects
