"""One picture in tiles that equal the whole frame, in memory that does not grow with the picture.

An adaptive block normalises with statistics of the whole frame; kernels come from the style; everything else is local.
So the network is walked block by block: each pass makes a block's map tile by tile, with true neighbours around each
tile, keeps it on disk, and gathers its statistics, which the next pass needs. Only the tiles' margins are computed
twice. On disk lie two maps at a time, at most 96 float32 bytes a pixel of the picture for the paper's network.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from adaconv import allocator
from adaconv.errors import UsageError
from adaconv.model.network import STRIDE, StyleTransferNet, padded_side, reflected
from adaconv.scratch import scratch_folder
from adaconv.stylize.layers import (
    Filter,
    Layer,
    Moments,
    Region,
    decoder_blocks,
    encoder_layers,
    run,
    sizes_along,
)
from adaconv.stylize.raster import FileRaster, MemoryRaster, Raster, Window, tiles

log = logging.getLogger(__name__)

_STEP = 64  # tiles' sides are multiples of it
_LEAST_SIDE = 64
_MARGIN = 32  # of a tile in the encoder's first map, each side; less in all others
# Maps of the widest full-size layer that live side by side while it is convolved: the input, its mirrored copy, the
# output, and what the convolution itself takes. Measured, as 1,300 bytes a pixel with the paper's 64 channels.
_MAPS_AT_ONCE, _BYTES_PER_VALUE = 5.2, 4
_BASE_BYTES = 450e6  # Python, torch, and what its kernels keep


class PaddedFrame:
    """A picture as the network sees it: (3, H, W) float32 in [0, 1], mirrored to multiples of 8."""

    def __init__(self, picture: Raster, *, smallest_map: int, device: torch.device) -> None:
        """`picture`: uint8, or floating in [0, 1]."""
        self._picture, self._device = picture, device
        self.height = padded_side(picture.height, smallest_map=smallest_map)
        self.width = padded_side(picture.width, smallest_map=smallest_map)

    def read(self, window: Window) -> Tensor:
        rows = reflected(torch.arange(window.top, window.bottom), self._picture.height)
        columns = reflected(torch.arange(window.left, window.right), self._picture.width)
        top, left = int(rows.min()), int(columns.min())
        values = self._picture.read(Window(top, int(rows.max()) + 1, left, int(columns.max()) + 1))
        if len(rows) != values.shape[-2] or len(columns) != values.shape[-1] or rows[0] != top or columns[0] != left:
            values = values.index_select(-2, rows - top).index_select(-1, columns - left)
        values = values.to(self._device)
        # As images.to_float, without Pillow: bench/ measures this on machines that have torch alone.
        scaled = values.float().div_(255) if values.dtype == torch.uint8 else values.float()
        return scaled.contiguous(memory_format=torch.channels_last)

    def write(self, window: Window, values: Tensor) -> None:
        raise TypeError("a picture is read only")


def plan_tile(height: int, width: int, *, network: StyleTransferNet, max_memory_gb: float) -> int | None:
    """Side of the tiles that a picture is stylized in; None where the whole frame fits.

    A pure function of the picture's size and the network, so that who computes it, and when, changes no output.

    Args:
        height: of the picture.
        width: of the picture.
        network: whose widest full-size map counts.
        max_memory_gb: of the process, in 10^9 bytes, with all that it holds besides.

    Raises:
        UsageError: not even the smallest tile fits.
    """
    parameters = sum(p.numel() * p.element_size() for p in network.parameters())
    room = max_memory_gb * 1e9 - _BASE_BYTES - parameters
    a_pixel = network.encoder.widths[0] * _BYTES_PER_VALUE * _MAPS_AT_ONCE
    if height * width * a_pixel <= room:
        return None
    side = int(max(0.0, room / a_pixel) ** 0.5 - 2 * _MARGIN) // _STEP * _STEP
    if side < _LEAST_SIDE:
        least = _BASE_BYTES + parameters + (_LEAST_SIDE + 2 * _MARGIN) ** 2 * a_pixel
        raise UsageError(
            f"tile.max_memory_gb: expected at least {least / 1e9:.2f} for this network, found {max_memory_gb:g}"
        )
    return side


class Tiler:
    """Walks one network over pictures; `side` None takes each picture as one tile, with its maps in memory.

    `scratch`: folder for the maps; None takes the system's folder for temporary files.
    """

    def __init__(self, network: StyleTransferNet, *, side: int | None, scratch: Path | None = None) -> None:
        if side is not None and (side < 8 or side % STRIDE):
            raise UsageError(f"expected a tile of a multiple of {STRIDE} pixels, found {side}")
        self._network, self._side, self._scratch = network, side, scratch
        self._device = next(network.parameters()).device
        self._encoder, self._blocks = encoder_layers(network), decoder_blocks(network)

    def stylize(
        self,
        picture: Raster,
        regions: Callable[[Moments], Sequence[Region]],
        write: Callable[[Window, Tensor], None],
    ) -> None:
        """Stylize a picture, tile by tile.

        Args:
            picture: (3, H, W), uint8 or floating in [0, 1].
            regions: what is applied where, asked for once the statistics of relu4_1 are known. Shares are of the
                frame padded to multiples of 8.
            write: is handed each window of the picture with its (1, 3, h, w), not clamped.
        """
        frame = PaddedFrame(picture, smallest_map=self._network.transfer.smallest_map, device=self._device)
        with ExitStack() as stack:
            folder = stack.enter_context(scratch_folder("tiles", self._scratch))
            features, moments = self._keep(self._encoder, frame, folder / "features", frame, stack)
            applied = regions(moments)
            if len(applied) == 1:
                self._walk(features, moments, applied[0], frame, folder, self._sink(picture, write), stack)
                return
            # Each region meets the statistics that its style alone would have: away from the borders between regions
            # the result is that of each style alone.
            known = [self._walk(features, moments, Region(r.code), frame, folder, None, stack) for r in applied]
            layers: list[Layer] = []
            for scale, (lead, follow) in enumerate(self._blocks):
                of_scale = [moments_of[scale] for moments_of in known]
                layers += [*lead, Filter(applied, scale, of_scale, stride=STRIDE >> scale), *follow]
            self._fill(layers, features, frame, self._sink(picture, write))

    def _walk(
        self,
        features: Raster,
        moments: Moments,
        region: Region,
        frame: Raster,
        folder: Path,
        sink: Callable[[Window, Tensor], None] | None,
        stack: ExitStack,
    ) -> list[Moments]:
        """From relu4_1 to the image, or, without a sink, to the last block's statistics."""

        def done(source: Raster) -> None:
            """Other regions begin with the features as well."""
            if source is not features or sink is not None:
                _close(source)

        known, source = [moments], features
        for scale, (lead, follow) in enumerate(self._blocks):
            layers = [*lead, Filter([region], scale, [known[-1]], stride=STRIDE >> scale), *follow]
            if scale == len(self._blocks) - 1:
                if sink is not None:
                    self._fill(layers, source, frame, sink)
            else:
                kept, of_kept = self._keep(layers, source, folder / f"map-{scale}", frame, stack)
                known.append(of_kept)
                done(source)
                source = kept
        done(source)
        return known

    def _keep(
        self, layers: Sequence[Layer], source: Raster, path: Path, frame: Raster, stack: ExitStack
    ) -> tuple[Raster, Moments]:
        """The chain's last map, and its statistics. The stack closes the map if nobody does before, for memory may run
        out at any tile.
        """
        moments = Moments()
        height, width = sizes_along(layers, source.height, source.width)[-1]
        kept: list[Raster] = []

        def keep(window: Window, values: Tensor) -> None:
            moments.add(values)
            if (window.height, window.width) == (height, width):
                kept.append(MemoryRaster(values))
                return
            if not kept:
                kept.append(FileRaster(path, values.shape[1], height, width, values.dtype, device=self._device))
                stack.callback(_close, kept[0])
            kept[0].write(window, values)

        self._fill(layers, source, frame, keep)
        return kept[0], moments

    def _fill(
        self, layers: Sequence[Layer], source: Raster, frame: Raster, sink: Callable[[Window, Tensor], None]
    ) -> None:
        """Every window of the chain's last map; each takes a tile of the frame."""
        height, width = sizes_along(layers, source.height, source.width)[-1]
        side = max(height, width) if self._side is None else max(1, self._side * height // frame.height)
        for window in tiles(height, width, side):
            sink(window, run(layers, source, window))
            if self._side is not None:
                allocator.give_back()  # tiles of other sizes would not use it again

    @staticmethod
    def _sink(picture: Raster, write: Callable[[Window, Tensor], None]) -> Callable[[Window, Tensor], None]:
        """Leaves out what was only padding."""

        def sink(window: Window, values: Tensor) -> None:
            top, bottom, left, right = window
            inside = Window(top, min(bottom, picture.height), left, min(right, picture.width))
            if inside.height > 0 and inside.width > 0:
                write(inside, values[..., : inside.height, : inside.width])

        return sink


def _close(raster: Raster) -> None:
    if isinstance(raster, FileRaster):
        raster.close()
