"""One picture stylized: against the peers' forward, which encodes the style anew for each.

    stylize/one/<side>/<precision>      content and style both new
    stylize/cached/<side>/<precision>   the style's code is there, as from a style pack

Each side is a process of its own, with the C library's default allocator for both.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch

from adaconv.model.encoder import VGGEncoder
from adaconv.model.network import StyleCode, build_network
from bench import work
from bench.measure import Row, Side, alternate_processes, device, floor_seconds
from bench.peers import NaotoAdaIN, RElbersAdaConv
from bench.work import Size

Precision = Literal["float32", "bfloat16"]
_AGAINST = "float32, torch.no_grad, default layout and allocator, style anew"


def one(quick: bool) -> Iterable[Row]:
    return _rows("stylize/one", quick)


def cached(quick: bool) -> Iterable[Row]:
    return _rows("stylize/cached", quick, style_cached=True)


def adain(quick: bool) -> Iterable[Row]:
    """The AdaIN baseline of this system against the reference of AdaIN."""
    return _rows("adain/stylize", quick, architecture="adain", baseline=naoto)


def _rows(
    name: str, quick: bool, *, style_cached: bool = False, baseline: Callable[..., Any] | None = None, **options: Any
) -> Iterable[Row]:
    size = Size((8, 16, 32, 64), 16, 64) if quick else Size()
    whose = "naoto0804's AdaIN" if baseline is naoto else "RElbers' AdaConv"
    for side in (256, 512, 1024):
        scaled = side // 8 if quick else side
        for precision, label, dtype in (("float32", "fp32", torch.float32), ("bfloat16", "bf16", torch.bfloat16)):
            shared = {"size": size, "side": scaled}
            ours, theirs = alternate_processes(
                Side(our_forward, {**shared, "precision": precision, "style_cached": style_cached, **options}),
                Side(baseline or relbers, shared),
                rounds=1 if quick else 9 if side < 1024 else 5,
            )
            flops = work.stylize_flops(size, scaled, style_cached=style_cached)
            moved = work.stylize_values(size, scaled, style_cached=style_cached) * dtype.itemsize
            yield Row(
                f"{name}/{side}/{label}",
                ours.seconds,
                theirs.seconds,
                floor_seconds(flops, moved, dtype),
                unit=f"one content of {scaled} px, style of {size.side} px",
                against=f"{whose}, {_AGAINST}",
                flops=flops,
                bytes_moved=moved,
                ours_peak_bytes=ours.peak_bytes,
                baseline_peak_bytes=theirs.peak_bytes,
            )


def our_forward(
    *,
    size: Size,
    side: int,
    precision: Precision,
    style_cached: bool,
    architecture: Literal["adaconv", "adain"] = "adaconv",
) -> Callable[[], Any]:
    torch.manual_seed(0)
    network = build_network(
        encoder=VGGEncoder(widths=size.widths),
        architecture=architecture,
        descriptor_channels=size.descriptor_channels,
        groups=size.groups,
    )
    network = network.to(device(), memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    content, style = _images(size, side)

    def stylize(code: StyleCode | None) -> Any:
        with torch.inference_mode(), torch.autocast(device().type, torch.bfloat16, enabled=precision == "bfloat16"):
            return network.stylize(content, code or network.encode_style(style))

    with torch.inference_mode():
        code = network.encode_style(style) if style_cached else None
    return lambda: stylize(code)


def relbers(*, size: Size, side: int) -> Callable[[], Any]:
    network = RElbersAdaConv(widths=size.widths, descriptor_channels=size.descriptor_channels, style_size=size.side)
    return _forward(network.to(device()).eval(), size, side)


def naoto(*, size: Size, side: int) -> Callable[[], Any]:
    return _forward(NaotoAdaIN(widths=size.widths).to(device()).eval(), size, side)


def _forward(network: torch.nn.Module, size: Size, side: int) -> Callable[[], Any]:
    content, style = _images(size, side)

    @torch.no_grad()
    def forward() -> Any:
        return network(content, style)

    return forward


def _images(size: Size, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(1, 3, side, side, device=device()), torch.rand(1, 3, size.side, size.side, device=device())
