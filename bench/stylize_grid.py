"""Contents x styles with the paper's network: N + M encodes, against content and style anew for each pair."""

import torch

from adaconv.model.encoder_weights import load_encoder
from adaconv.model.network import build_network
from bench.measure import Row, alternate, device, peak_flops

_GFLOP_ENCODE, _GFLOP_STYLE, _GFLOP_DECODE = 31.6, 6.6, 31.6  # of one 256 px image


def rows(quick: bool) -> list[Row]:
    count = 2 if quick else 12
    network = build_network(encoder=load_encoder("seeded:0")).to(device()).eval()
    contents, styles = torch.rand(2, count, 1, 3, 256, 256, device=device())

    @torch.inference_mode()
    def ours() -> None:
        codes = [network.encode_style(style) for style in styles]
        for content in contents:
            features = network.encode_content(content)
            for code in codes:
                network.decode(features, code, height=256, width=256)

    @torch.inference_mode()
    def pair_by_pair() -> None:
        for content in contents:
            for style in styles:
                network(content, style)

    seconds = alternate(ours, pair_by_pair, rounds=1 if device().type == "cpu" else 5)
    gflop = 2 * count * _GFLOP_ENCODE + count * _GFLOP_STYLE + count**2 * _GFLOP_DECODE
    return [Row("stylize/grid", *seconds, floor=gflop * 1e9 / peak_flops(), unit=f"{count} x {count} at 256 px")]
