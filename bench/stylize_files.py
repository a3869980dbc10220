"""Outputs as files: a content in many styles to PNGs, against the peers' way, one after another.

Ours decodes in batches on a GPU while as many threads as cores write; a peer's script stylizes, saves, and goes on.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from adaconv.checkpoint import ModelInfo
from adaconv.data.synthetic import generate_paintings
from adaconv.images import to_tensor, to_uint8
from adaconv.model import work
from adaconv.model.work import Size
from adaconv.stylize.outputs import Recipe, encode
from adaconv.stylize.production import Limits, Options, Production, Wanted
from adaconv.stylize.stylizer import Stylizer
from bench.measure import Row, Side, alternate_processes, device, floor_seconds
from bench.peers import PEERS, RElbersAdaConv
from bench.sizes import network_of, size_of

_CORES = os.cpu_count() or 1


def rows(quick: bool, *, side: int) -> Iterable[Row]:
    size, scaled = size_of("adaconv", quick=quick), side // 4 if quick else side
    count = 4 if quick else 64 if device().type == "cuda" else 8
    with tempfile.TemporaryDirectory(prefix="adaconv-bench-") as folder:
        generate_paintings(Path(folder) / "pictures", count + 1, seed=0, size=scaled)
        shared = {"size": size, "folder": folder}
        ours, theirs = alternate_processes(Side(our_files, shared), Side(peers_files, shared), rounds=1 if quick else 3)
        encoding = count * _seconds_of_a_png(Path(folder), size) / _CORES
    flops = work.encoder_flops(size, scaled) + count * work.decoder_flops(size, scaled)
    moved = count * work.stylize_values(size, scaled, style_cached=True) * torch.bfloat16.itemsize
    network = floor_seconds(flops, moved, torch.bfloat16)
    yield Row(
        f"stylize/files/{side}/bf16",
        ours.seconds,
        theirs.seconds,
        max(network, encoding) if device().type == "cuda" else network + encoding,  # whose cores are the same
        unit=f"a content of {scaled} px in {count} styles to PNG, {_CORES} cores",
        against=f"{PEERS['adaconv']}, float32, style anew, Image.save, one after another",
        flops=flops,
        bytes_moved=moved,
        ours_peak_bytes=ours.peak_bytes,
        baseline_peak_bytes=theirs.peak_bytes,
    )


def our_files(*, size: Size, folder: str) -> Callable[[], Any]:
    stylizer = _stylizer(size)
    content, *styles = _pictures(Path(folder))
    wanted = [_wanted(stylizer, style, number) for number, style in enumerate(styles)]
    limits = Limits(batch_size=16, writers=_CORES)

    def files() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as output:
            made = Production(lambda: stylizer, output, limits).make(content, wanted)
            assert all(one.state == "done" for one in made)

    return files


def peers_files(*, size: Size, folder: str) -> Callable[[], Any]:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    network = RElbersAdaConv(
        widths=size.widths, descriptor_channels=size.descriptor_channels, style_size=size.side
    ).to(device()).eval()  # fmt: skip
    content, *styles = _pictures(Path(folder))

    @torch.no_grad()
    def files() -> None:
        pixels = to_tensor(Image.open(content))[None].to(device())
        with tempfile.TemporaryDirectory(dir=folder) as output:
            for style in styles:
                picture = Image.open(style).resize((size.side, size.side))
                out = network(pixels, to_tensor(picture)[None].to(device()))
                Image.fromarray(to_uint8(out[0])).save(f"{output}/{style.stem}.png")

    return files


def _stylizer(size: Size) -> Stylizer:
    torch.manual_seed(0)
    network = network_of(size)
    return Stylizer(network, ModelInfo("0" * 64, {}, "", 0), device=device().type, precision="bfloat16")


def _pictures(folder: Path) -> list[Path]:
    return sorted((folder / "pictures").iterdir())


def _wanted(stylizer: Stylizer, style: Path, number: int) -> Wanted:
    pack = stylizer.style_pack(Image.open(style), source=style.name)
    options = asdict(Options(precision="bfloat16"))
    recipe = Recipe("c", "1" * 64, style.name, pack.source_sha256, pack.digest, "m", stylizer.info.digest, options)
    return Wanted(number, recipe, lambda: pack)


def _seconds_of_a_png(folder: Path, size: Size) -> float:
    """Of one core, for a picture that the network made."""
    stylizer = _stylizer(size)
    content, style, *_ = _pictures(folder)
    wanted = _wanted(stylizer, style, 0)
    made = stylizer.stylize(Image.open(content), wanted.pack())
    began = time.perf_counter()
    for _ in range(8):
        encode(made, wanted.recipe)
    return (time.perf_counter() - began) / 8
