"""Contents x styles: N + M encodes, against the peers' content and style anew for each pair."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from adaconv.model import work
from adaconv.model.work import Size
from bench.measure import Row, Side, alternate_processes, device, floor_seconds
from bench.peers import PEERS, RElbersAdaConv
from bench.sizes import network_of, size_of


def rows(quick: bool) -> Iterable[Row]:
    count, size, side = (2, size_of("adaconv", quick=True), 64) if quick else (12, size_of("adaconv", quick=False), 256)
    shared = {"size": size, "side": side, "count": count}
    ours, theirs = alternate_processes(Side(our_grid, shared), Side(pair_by_pair, shared), rounds=1)
    flops = count * (work.encoder_flops(size, side) + work.encoder_flops(size, size.side) + work.style_flops(size))
    flops += count**2 * work.decoder_flops(size, side)
    moved = 4 * count**2 * work.stylize_values(size, side, style_cached=True) / 2  # the encoder's half, once a content
    yield Row(
        "stylize/grid",
        ours.seconds,
        theirs.seconds,
        floor_seconds(flops, moved),
        unit=f"{count} x {count} pictures of {side} px",
        against=f"{PEERS['adaconv']}, pair by pair, no_grad, default layout and allocator",
        flops=flops,
        bytes_moved=moved,
        ours_peak_bytes=ours.peak_bytes,
        baseline_peak_bytes=theirs.peak_bytes,
    )


def our_grid(*, size: Size, side: int, count: int) -> Callable[[], Any]:
    torch.manual_seed(0)
    network = network_of(size)
    network = network.to(device(), memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    contents, styles = _images(count, side), _images(count, size.side)

    @torch.inference_mode()
    def grid() -> None:
        codes = [network.encode_style(style) for style in styles]
        for content in contents:
            features = network.encode_content(content)
            for code in codes:
                network.decode(features, code, height=side, width=side)

    return grid


def pair_by_pair(*, size: Size, side: int, count: int) -> Callable[[], Any]:
    network = RElbersAdaConv(
        widths=size.widths, descriptor_channels=size.descriptor_channels, style_size=size.side
    ).to(device()).eval()  # fmt: skip
    contents, styles = _images(count, side), _images(count, size.side)

    @torch.no_grad()
    def pairs() -> None:
        for content in contents:
            for style in styles:
                network(content, style)

    return pairs


def _images(count: int, side: int) -> torch.Tensor:
    return torch.rand(count, 1, 3, side, side, device=device())
