"""One content to its outputs: opened once, encoded once, each output published when it is made.

Files are encoded and published by threads beside the network: a GPU makes many pictures in the time that a PNG takes a
core. Pillow's encoders of PNG and WebP let other threads run.

What runs out of memory is tried again smaller: fewer styles at a time, then tiles, then smaller tiles; what does not
fit even so is named, never skipped.
"""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from adaconv import storage
from adaconv.images import ImageError, open_header, to_levels, to_uint8
from adaconv.scratch import scratch_folder
from adaconv.stylize import large
from adaconv.stylize.colour import Color
from adaconv.stylize.inputs import decode_picture, metadata_of
from adaconv.stylize.outputs import LONGEST_SIDE, Metadata, Recipe, encode, is_whole
from adaconv.stylize.pictures import pixels_of, scaled, shrink, thumbnail
from adaconv.stylize.raster import FileRaster, MemoryRaster, Raster, Window
from adaconv.stylize.style_pack import StylePack
from adaconv.stylize.stylizer import Blend, Encoded, Precision, Stylizer

log = logging.getLogger(__name__)

_SMALLEST_TILE = 64
_DEATHS_BEFORE_TILES = 3
_HEADER_BYTES = 2**16


@dataclass(frozen=True)
class Options:
    """What determines an output's bytes, besides its content, its style and the model. See config/stylize.py."""

    content_side: int | None = None
    style_side: int = 256
    precision: Precision = "float32"
    alpha: float = 1.0
    color: Color = "style"
    format: str = "png"
    quality: int = 90
    keep_metadata: bool = False


@dataclass(frozen=True)
class Limits:
    """What a picture may take; none of it changes an output but for rounding.

    `batch_size`: styles at once on a GPU; on CPUs it would bring nothing, and roundings that no recipe tells of.
    `writers`: threads that encode and publish beside the network; pictures of twice as many wait for them at most.
    `tile`: side of tiles for every picture; None tiles what would take more memory than the stylizer may.
    """

    batch_size: int = 1
    writers: int = 1
    tile: int | None = None
    max_megapixels: float = 80.0
    scratch: Path | None = None
    thumbnail_side: int = 192


@dataclass(frozen=True)
class Wanted:
    """An output that is to be made. `key`: whatever tells the caller which it is. `pack`: read when it is needed."""

    key: Any
    recipe: Recipe
    pack: Callable[[], StylePack]
    shown: bool = False

    @property
    def options(self) -> Options:
        return Options(**self.recipe.options)


@dataclass(frozen=True)
class Made:
    """What became of it: `done`, `skipped` because it is there, or `failed` with a reason."""

    key: Any
    state: str
    reason: str = ""
    width: int = 0
    height: int = 0
    tile: int | None = None
    seconds: float = 0.0
    thumbnail: bytes = b""


@dataclass(frozen=True)
class _Picture:
    """A whole frame on its way to its file. `levels`: (H, W, 3) uint8. `recipe`: how it was made is in it."""

    wanted: Wanted
    recipe: Recipe
    levels: NDArray[np.uint8]
    seconds: float


class Production:
    """Outputs below one root, by one model, which is asked for when there is something to make.

    Args:
        stylizer: holds the model.
        root: of the job.
        limits: what a picture may take.
        there: names of outputs that are known to be whole.
        look: for any other; else it is made.
    """

    def __init__(
        self,
        stylizer: Callable[[], Stylizer],
        root: str,
        limits: Limits,
        there: Container[str] = frozenset(),
        *,
        look: bool = True,
    ) -> None:
        self._ask, self._root, self._limits, self._there, self._look = stylizer, root, limits, there, look

    @property
    def _stylizer(self) -> Stylizer:
        return self._ask()

    def make(
        self, path: Path, wanted: Sequence[Wanted], *, begin: Callable[[int], int] = lambda left: 0
    ) -> Iterator[Made]:
        """Every output of a content, in any order.

        Args:
            path: of the content's file.
            wanted: its outputs.
            begin: told how many are left to be made; how many workers died at as many. From the third on the content is
                made in small tiles.

        Raises:
            ImageError: the content is no usable picture; what was yielded before stands.
            OSError: storage fails.
        """
        todo: dict[tuple[int | None, bool], list[Wanted]] = {}
        sizes: dict[int | None, tuple[int, int]] = {}  # of what is there, one for each side of the content
        for one in wanted:
            uri = storage.join(self._root, one.recipe.name)
            options = one.options
            if one.recipe.name in self._there or (self._look and is_whole(uri)):
                made = self._seen(one, uri, sizes.get(options.content_side))
                sizes[options.content_side] = made.width, made.height
                yield made
            else:
                todo.setdefault((options.content_side, options.keep_metadata), []).append(one)
        if not todo:
            return
        deaths = begin(sum(map(len, todo.values())))
        with open_header(path, max_pixels=int(self._limits.max_megapixels * 1e6)) as header:
            stored = header.size
        for (side, keep), group in todo.items():
            metadata = metadata_of(path) if keep else None
            yield from self._make_alike(path, stored, side, metadata, group, deaths)

    def _make_alike(
        self,
        path: Path,
        stored: tuple[int, int],
        side: int | None,
        metadata: Metadata | None,
        wanted: list[Wanted],
        deaths: int,
    ) -> Iterator[Made]:
        """Outputs that see the content alike, by attempts that take less and less memory."""
        size = stored if side is None or min(stored) <= side else scaled(stored, side)
        left: list[Wanted] = []
        for one in wanted:
            kind = one.options.format
            if max(size) <= LONGEST_SIDE.get(kind, max(size)):
                left.append(one)
                continue
            reason = f"too_large_for_format: {size[0]}x{size[1]} exceeds the {LONGEST_SIDE[kind]} px a side of {kind}"
            yield Made(one.key, "failed", f"{reason}; take png or tiff, or a smaller options.content_side")
        attempts, told = self._attempts(*size, deaths), ""
        while left:
            attempt = next(attempts, None)
            if attempt is None:
                reason = f"out_of_memory: not even the smallest tiles fit ({told}); give actors more memory"
                yield from (Made(one.key, "failed", reason) for one in left)
                return
            try:
                for made in self._attempt(path, side, metadata, list(left), *attempt):
                    left = [one for one in left if one.key != made.key]
                    yield made
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                told = str(error).partition("\n")[0]
                log.warning("%s: out of memory with a batch of %d and tiles of %s; trying less", path, *attempt)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    def _attempts(self, width: int, height: int, deaths: int) -> Iterator[tuple[int, int | None]]:
        """(batch, tile), the largest first."""
        limits = self._limits
        tile = limits.tile or self._stylizer.tile_of(height, width)
        if deaths >= _DEATHS_BEFORE_TILES:
            tile = min(tile or 256, 256)
        if tile is None:
            batch = limits.batch_size if self._stylizer.device == "cuda" else 1
            while batch >= 1:
                yield batch, None
                batch //= 2
            tile = 1024
            while tile >= max(width, height):
                tile //= 2
        while tile >= _SMALLEST_TILE:
            yield 1, tile
            tile = tile // 2 // 8 * 8

    def _attempt(
        self,
        path: Path,
        side: int | None,
        metadata: Metadata | None,
        wanted: list[Wanted],
        batch: int,
        tile: int | None,
    ) -> Iterator[Made]:
        pixels_limit = int(self._limits.max_megapixels * 1e6)
        if tile is None:
            picture = shrink(decode_picture(path, max_pixels=pixels_limit, keep_colours=metadata is not None), side)
            yield from self._published(self._make_whole(pixels_of(picture), wanted, batch), metadata)
            return
        with scratch_folder("large", self._limits.scratch) as folder, contextlib.ExitStack() as stack:
            content: Raster
            if side is None and large.reads(path):
                content = large.unpack(path, folder / "content", keep_colours=metadata is not None)
                stack.callback(content.close)
            else:
                picture = decode_picture(path, max_pixels=pixels_limit, keep_colours=metadata is not None)
                content = MemoryRaster(pixels_of(shrink(picture, side)))
            for one in wanted:
                yield self._make_tiled(content, metadata, one, tile, folder)

    def _make_whole(self, pixels: Tensor, wanted: list[Wanted], batch: int) -> Iterator["_Picture"]:
        encoded = self._stylizer.encode(pixels)
        for start in range(0, len(wanted), batch):
            began = time.monotonic()
            chosen = wanted[start : start + batch]
            plain = all(one.options.alpha == 1 and one.options.color == "style" for one in chosen)
            if plain:
                stylized = self._stylizer.decode_batch(encoded, [one.pack() for one in chosen])
            else:
                stylized = [self._blend(encoded, pixels, one) for one in chosen]
            levels = [to_uint8(values[0]) for values in stylized]
            seconds = (time.monotonic() - began) / len(chosen)
            for one, values in zip(chosen, levels, strict=True):
                # The recipe is of this thread: torch counts its threads for each by itself.
                yield _Picture(one, self._recipe(one, None, batch=len(chosen)), values, seconds)

    def _published(self, pictures: Iterator["_Picture"], metadata: Metadata | None) -> Iterator[Made]:
        """What became of each picture; the next ones are made meanwhile."""
        waiting: deque[Future[Made]] = deque()

        def written(at_most: int = 0) -> Iterator[Made]:
            while waiting and (len(waiting) > at_most or waiting[0].done()):
                yield waiting.popleft().result()

        with ThreadPoolExecutor(self._limits.writers) as writers:
            try:
                for picture in pictures:
                    waiting.append(writers.submit(self._publish, picture, metadata))
                    yield from written(2 * self._limits.writers)
                yield from written()
            except (MemoryError, RuntimeError):
                yield from written()  # it is not made again, though what is left is
                raise

    def _publish(self, picture: "_Picture", metadata: Metadata | None) -> Made:
        began = time.monotonic()
        image, recipe = Image.fromarray(picture.levels), picture.recipe
        storage.publish_bytes(storage.join(self._root, recipe.name), encode(image, recipe, metadata=metadata))
        shown = thumbnail(image, side=self._limits.thumbnail_side) if picture.wanted.shown else b""
        seconds = picture.seconds + time.monotonic() - began
        return Made(picture.wanted.key, "done", "", *image.size, None, seconds, shown)

    def _blend(self, encoded: Encoded, pixels: Tensor, one: Wanted) -> Tensor:
        out = MemoryRaster(torch.empty(encoded.image.shape))
        self._stylize(MemoryRaster(pixels), one, out.write, tile=None, encoded=encoded)
        return out.values

    def _make_tiled(self, content: Raster, metadata: Metadata | None, one: Wanted, tile: int, folder: Path) -> Made:
        began = time.monotonic()
        height, width = content.height, content.width
        stylized = FileRaster(folder / "stylized", 3, height, width, torch.uint8)
        recipe = self._recipe(one, tile)
        target = folder / "output"
        try:
            canvas = None
            if one.options.color == "coral":
                canvas = FileRaster(folder / "canvas", 3, height, width, torch.float32)
            try:
                self._stylize(content, one, partial(_write_levels, stylized), tile=tile, canvas=canvas)
            finally:
                if canvas:
                    canvas.close()
            large.pack(stylized, target, recipe, metadata=metadata)
        finally:
            stylized.close()
        storage.publish_file(target, storage.join(self._root, recipe.name))
        shown = file_thumbnail(target, side=self._limits.thumbnail_side) if one.shown else b""
        target.unlink()
        return Made(one.key, "done", "", width, height, tile, time.monotonic() - began, shown)

    def _stylize(self, content: Raster, one: Wanted, write: Any, *, tile: int | None, **how: Any) -> None:
        blend = Blend((one.pack(),), one.options.alpha)
        self._stylizer.stylize_raster(content, blend, write, color=one.options.color, tile=tile, **how)

    def _recipe(self, one: Wanted, tile: int | None, *, batch: int = 1) -> Recipe:
        made: dict[str, Any] = {"tile": tile, "device": self._stylizer.device}
        made["torch"] = torch.__version__.partition("+")[0]
        # How sums are split:
        if self._stylizer.device == "cpu":
            made["threads"] = torch.get_num_threads()
        else:
            made |= {"batch": batch, "gpu": torch.cuda.get_device_name()}
        return replace(one.recipe, made=made)

    def _seen(self, one: Wanted, uri: str, size: tuple[int, int] | None) -> Made:
        """An output that is there already. On an object store no more of it is read than must be."""
        if size and not one.shown:
            return Made(one.key, "skipped", "", *size)
        if not one.shown and not storage.is_local(uri):
            head = storage.read_range(uri, 0, _HEADER_BYTES)
            # Of a TIFF, a WebP, or a JPEG with much metadata, what tells the size ends later.
            with contextlib.suppress(ImageError), open_header(head, max_pixels=None) as header:
                return Made(one.key, "skipped", "", *header.size)
        with scratch_folder("seen", self._limits.scratch) as folder:
            path = Path(uri)
            if not storage.is_local(uri):
                path = folder / storage.name_of(uri)
                path.write_bytes(storage.read_bytes(uri))
            with open_header(path, max_pixels=None) as header:
                size = header.size
            shown = file_thumbnail(path, side=self._limits.thumbnail_side) if one.shown else b""
        return Made(one.key, "skipped", "", *size, None, 0.0, shown)


def file_thumbnail(path: Path, *, side: int) -> bytes:
    """Of a content or an output; nothing where it cannot be shown, which is no reason to fail."""
    with contextlib.suppress(Exception):
        whole = not large.reads(path)
        picture = decode_picture(path, max_pixels=None) if whole else large.thumbnail_of(path, side=side)
        return thumbnail(picture, side=side)
    return b""


def _write_levels(raster: FileRaster, window: Window, values: Tensor) -> None:
    raster.write(window, to_levels(values))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says so; torch has no class of its own for that on a CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    told = str(error).lower()  # on a CPU, torch's is a RuntimeError, and oneDNN's says no more than this
    if "can't start new thread" in told:  # its stack has no room
        return True
    return ("alloc" in told and "memory" in told) or "could not create a" in told
