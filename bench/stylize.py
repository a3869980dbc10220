"""One picture stylized: against the peers' forward, which encodes the style anew for each.

    stylize/one/<side>/<precision>      content and style both new
    stylize/cached/<side>/<precision>   the style's code is there, as from a style pack

Each side is a process of its own, with the C library's default allocator for both.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch

from adaconv.model import work
from adaconv.model.network import StyleCode
from adaconv.model.work import Size
from bench.measure import Row, Side, alternate_processes, device, floor_seconds
from bench.peers import PEERS, NaotoAdaIN, RElbersAdaConv
from bench.sizes import SHORT, Precision, network_of, size_of


def rows(
    quick: bool,
    *,
    side: int,
    precision: Precision,
    style_cached: bool = False,
    batch: int = 1,
    architecture: Literal["adaconv", "adain"] = "adaconv",
) -> Iterable[Row]:
    size, scaled = size_of(architecture, quick=quick), side // 8 if quick else side
    shared = {"size": size, "side": scaled, "batch": batch}
    ours, theirs = alternate_processes(
        Side(our_forward, {**shared, "precision": precision, "style_cached": style_cached}),
        Side(peers_forward, shared),
        rounds=1 if quick else 9 if side < 1024 else 5,
    )
    dtype = getattr(torch, precision)
    flops = batch * work.stylize_flops(size, scaled, style_cached=style_cached)
    moved = batch * work.stylize_values(size, scaled, style_cached=style_cached) * dtype.itemsize
    what = "adain/stylize" if architecture == "adain" else "stylize/cached" if style_cached else "stylize/one"
    yield Row(
        f"{what}/{side}/{SHORT[precision]}" + (f"/batch_{batch}" if batch > 1 else ""),
        ours.seconds,
        theirs.seconds,
        floor_seconds(flops, moved, dtype),
        unit=f"{batch} contents of {scaled} px, as many styles of {size.side} px",
        against=f"{PEERS[architecture]}, float32 without TF32, no_grad, default layout and allocator, style anew",
        flops=flops,
        bytes_moved=moved,
        ours_peak_bytes=ours.peak_bytes,
        baseline_peak_bytes=theirs.peak_bytes,
    )


def our_forward(*, size: Size, side: int, batch: int, precision: Precision, style_cached: bool) -> Callable[[], Any]:
    torch.manual_seed(0)
    network = network_of(size)
    network = network.to(device(), memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    content, style = _images(size, side, batch)

    def stylize(code: StyleCode | None) -> Any:
        with torch.inference_mode(), torch.autocast(device().type, torch.bfloat16, enabled=precision == "bfloat16"):
            return network.stylize(content, code or network.encode_style(style))

    with torch.inference_mode():
        code = network.encode_style(style) if style_cached else None
    return lambda: stylize(code)


def peers_forward(*, size: Size, side: int, batch: int) -> Callable[[], Any]:
    network: torch.nn.Module
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if size.architecture == "adain":
        network = NaotoAdaIN(widths=size.widths)
    else:
        network = RElbersAdaConv(widths=size.widths, descriptor_channels=size.descriptor_channels, style_size=size.side)
    network = network.to(device()).eval()
    content, style = _images(size, side, batch)

    def forward() -> Any:
        with torch.no_grad():
            return network(content, style)

    return forward


def _images(size: Size, side: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    contents = torch.rand(batch, 3, side, side, device=device())
    return contents, torch.rand(batch, 3, size.side, size.side, device=device())
