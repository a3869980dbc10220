"""One large picture in tiles, against the whole frame: what bounded memory costs.

The result is the same within 1e-4; see tests/stylize/test_tiling.py. Each side is a process of its own.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from adaconv.model import work
from adaconv.model.network import StyleTransferNet
from adaconv.model.work import Size
from adaconv.stylize.layers import Region
from adaconv.stylize.raster import MemoryRaster
from adaconv.stylize.tiling import Tiler
from bench.measure import Row, Side, alternate_processes, device, floor_seconds
from bench.sizes import network_of, size_of


def rows(quick: bool, *, side: int, tile: int) -> Iterable[Row]:
    size = size_of("adaconv", quick=quick)
    if quick:
        side, tile = side // 8, tile // 8
    shared = {"size": size, "side": side}
    ours, whole = alternate_processes(Side(tiled, {**shared, "tile": tile}), Side(whole_frame, shared), rounds=1)
    flops = work.stylize_flops(size, side, style_cached=True)
    moved = work.stylize_values(size, side, style_cached=True) * 4
    yield Row(
        f"stylize/tiled/{side if not quick else side * 8}",
        ours.seconds,
        whole.seconds,
        floor_seconds(flops, moved),
        unit=f"one content of {side} px in tiles of {tile}, style cached",
        against="the same network on the whole frame",
        flops=flops,
        bytes_moved=moved,
        ours_peak_bytes=ours.peak_bytes,
        baseline_peak_bytes=whole.peak_bytes,
    )


def tiled(*, size: Size, side: int, tile: int) -> Callable[[], Any]:
    network, content, code = _made(size, side)
    out = torch.empty_like(content)

    @torch.inference_mode()
    def stylize() -> None:
        tiler = Tiler(network, side=tile)
        tiler.stylize(MemoryRaster(content), lambda moments: [Region(code)], MemoryRaster(out).write)

    return stylize


def whole_frame(*, size: Size, side: int) -> Callable[[], Any]:
    network, content, code = _made(size, side)

    @torch.inference_mode()
    def stylize() -> None:
        network.stylize(content, code)

    return stylize


@torch.inference_mode()
def _made(size: Size, side: int) -> tuple[StyleTransferNet, torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    network = network_of(size)
    network = network.to(device(), memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    content = torch.rand(1, 3, side, side, device=device())
    return network, content, network.encode_style(torch.rand(1, 3, size.side, size.side, device=device()))
