"""A PNG of any size to a stylized PNG, with the peak of memory: does it grow with the picture?

Memory is all that the process has, pages of files and libraries included (VmRSS).

python bench/stylize_large.py --side 2048 --max-memory-gb 0.6 --small      2048² and 8192², a narrow network
python bench/stylize_large.py --side 8192 --growth 1 --max-memory-gb 4     the paper's network
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from adaconv import allocator
from adaconv.checkpoint import ModelInfo
from adaconv.images import open_header
from adaconv.stylize import large
from adaconv.stylize.outputs import Recipe
from adaconv.stylize.production import Limits, Options, Production, Wanted
from adaconv.stylize.raster import FileRaster, tiles
from adaconv.stylize.stylizer import Stylizer
from bench.sizes import network_of, size_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, required=True, help="of the square picture, in pixels")
    parser.add_argument("--growth", type=int, default=4, help="a second picture is so many times as wide; 1: none")
    parser.add_argument("--max-memory-gb", type=float, default=4.0)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--small", action="store_true", help="an eighth of the paper's channels")
    parser.add_argument("--scratch", type=Path, help="folder for files; None is the system's")
    options = parser.parse_args()
    if options.growth > 1:  # each in a process of its own, which has a peak of its own
        for side in (options.side, options.side * options.growth):
            again = [sys.executable, __file__, *sys.argv[1:], "--side", str(side), "--growth", "1"]
            subprocess.run(again, check=True)
        return 0
    with tempfile.TemporaryDirectory(prefix="adaconv-bench-", dir=options.scratch) as folder:
        print(json.dumps(measure(options, Path(folder))), flush=True)
    return 0


def measure(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    size = size_of("adaconv", quick=options.small)
    torch.manual_seed(0)
    network = network_of(size)
    for module in network.modules():  # an encoder without weights of its own: maps that are neither zero nor infinite
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    stylizer = Stylizer(
        network,
        ModelInfo("0" * 64, {}, "", 0),
        precision=options.precision,
        max_memory_gb=options.max_memory_gb,
        scratch=folder,
    )
    pack = stylizer.style_pack(torch.rand(3, 256, 256))
    recipe = Recipe("content.png", "0" * 64, "style", "1" * 64, pack.digest, "bench", "0" * 64, Options().__dict__)
    picture = FileRaster(folder / "drawn", 3, options.side, options.side, torch.uint8)
    for window in tiles(options.side, options.side, 1024):
        coarse = torch.rand(1, 3, window.height // 32 + 1, window.width // 32 + 1)
        drawn = nn.functional.interpolate(coarse, size=(window.height, window.width), mode="bilinear")
        picture.write(window, drawn.mul(255).to(torch.uint8))
    large.pack(picture, folder / "content.png", recipe)
    picture.close()
    allocator.give_back()  # what drawing it left is not the job's
    began, before = time.perf_counter(), _memory()
    limits = Limits(max_megapixels=1e6, scratch=folder)
    wanted = Wanted(0, recipe, lambda: pack)
    with _Peak() as peak:
        (made,) = Production(lambda: stylizer, str(folder), limits).make(folder / "content.png", [wanted])
    with open_header(folder / recipe.name, max_pixels=None) as image:
        assert image.size == (options.side, options.side)
    return {
        "side": options.side,
        "megapixels": options.side**2 / 1e6,
        "precision": options.precision,
        "tile": made.tile,
        "seconds": round(time.perf_counter() - began, 1),
        "memory_before_mb": round(before / 1e6),
        "peak_mb": round(peak.bytes / 1e6),
        "limit_mb": round(options.max_memory_gb * 1e3),
    }


class _Peak:
    """The most memory that is seen while the block runs, a hundred times a second."""

    def __enter__(self) -> "_Peak":
        self.bytes, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.01):
            self.bytes = max(self.bytes, _memory())


def _memory() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(main())
