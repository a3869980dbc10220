"""Raw images to shards on all cores: against img2dataset on the same files, and decode + resize + encode alone.

img2dataset needs older releases than this project: give the Python of an environment that has it by
ADACONV_IMG2DATASET=/path/to/python. Without it the baseline is what its workers do, by Pillow, in as many processes:
decode, resize, encode every image into a tar; no checks, no hashes, no manifest.
"""

import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from adaconv.config.shard import RecipeConfig, ShardConfig
from adaconv.data.builds import spill_listing
from adaconv.data.ingest import recipe_of, stored_size
from adaconv.data.sources import iter_images
from adaconv.data.synthetic import generate_paintings
from adaconv.images import encode_jpeg, scale_down
from adaconv.orchestration.cluster import connect
from bench.measure import Row, Seconds, alternate

_CORES = os.cpu_count() or 1
_SIZES = ((1280, 960), (960, 720), (640, 480))  # two of three are scaled down, one keeps its bytes
_RECIPE = RecipeConfig(target_mb=16)
_PART = 24  # files
_IMG2DATASET = """
import sys, time
from img2dataset import download
urls, out, processes = sys.argv[1:]
began = time.perf_counter()
download(url_list=urls, output_folder=out, output_format="webdataset", input_format="txt", image_size=512,
         resize_mode="keep_ratio", resize_only_if_bigger=True, encode_quality=95, encode_format="jpg",
         processes_count=int(processes), thread_count=8, number_sample_per_shard=100, enable_wandb=False)
print("seconds", time.perf_counter() - began)
"""


def rows(quick: bool) -> list[Row]:
    folder = Path(tempfile.mkdtemp(prefix="adaconv-bench-"))
    count = 30 if quick else 4800  # so many that cores do not wait for the last shard
    # Ray lowers the priority of its workers; whatever else this machine does is to fall on all that is compared.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Both sides without the start of their processes: Ray ends a worker that had nothing to do for a second.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "3600000")
    try:
        _draw(folder / "raw", count)
        # Forked before Ray's threads are there: a later fork of this process can leave them waiting for ever.
        with ProcessPoolExecutor(_CORES, mp_context=get_context("fork")) as processes:
            list(processes.map(abs, range(_CORES)))
            with connect():
                return [_row(folder, count, processes, rounds=1 if quick else 3)]
    finally:
        shutil.rmtree(folder)


def _row(folder: Path, count: int, processes: ProcessPoolExecutor, rounds: int) -> Row:
    from adaconv.orchestration.shard_job import run_shard_job

    files = sorted((folder / "raw").iterdir())
    made = iter(range(1000))

    def ours() -> None:
        root = folder / f"ours-{next(made)}"
        config = ShardConfig(source=(str(folder / "raw"),), output=str(root), shard=_RECIPE)
        with tempfile.TemporaryDirectory() as scratch:
            listing = spill_listing(iter_images(config.source), Path(scratch))
            run_shard_job(config, listing, recipe_of(_RECIPE))
        shutil.rmtree(root)

    def in_processes(work: Callable[[Sequence[Path]], None]) -> None:
        # In small parts that are handed out as cores are free: halves that take unequal time would raise the floor.
        list(processes.map(work, [files[first : first + _PART] for first in range(0, len(files), _PART)]))

    python = os.environ.get("ADACONV_IMG2DATASET")
    if python:
        urls = folder / "urls.txt"
        urls.write_text("".join(f"file://{file}\n" for file in files))

        def baseline() -> Any:
            return Seconds(_img2dataset(python, urls, folder / "img2dataset", _CORES))
    else:

        def baseline() -> Any:
            in_processes(_as_peers_do)

    ours_seconds, peers_seconds, floor = alternate(
        ours, baseline, lambda: in_processes(_decode_resize_encode), rounds=rounds
    )
    peer = "img2dataset" if python else "Pillow as img2dataset's workers"
    return Row(
        "shard",
        ours_seconds,
        peers_seconds,
        floor=floor,
        unit=f"{count} images on {_CORES} cores; the baseline is {peer}",
    )


def _decode_resize_encode(files: Sequence[Path]) -> None:
    """The pixels' part of ours: what the header lets keep its bytes is decoded, to see that it is whole."""
    for file in files:
        data = file.read_bytes()
        size = Image.open(io.BytesIO(data)).size
        if stored_size(*size, _RECIPE) == size:
            simplejpeg.decode_jpeg(data, "GRAY")
        else:
            pixels = simplejpeg.decode_jpeg(data, "RGB")
            small = scale_down(pixels, *stored_size(*size, _RECIPE), kernel=_RECIPE.resample)
            encode_jpeg(Image.fromarray(small), quality=_RECIPE.jpeg_quality)


def _as_peers_do(files: Sequence[Path]) -> None:
    with tempfile.TemporaryFile() as target, tarfile.open(fileobj=target, mode="w") as tar:
        for file in files:
            with Image.open(file) as image:
                picture = image.convert("RGB").resize(stored_size(*image.size, _RECIPE), Image.Resampling.BICUBIC)
            jpeg = encode_jpeg(picture, quality=_RECIPE.jpeg_quality)
            member = tarfile.TarInfo(file.name)
            member.size = len(jpeg)
            tar.addfile(member, io.BytesIO(jpeg))


def _img2dataset(python: str, urls: Path, output: Path, processes: int) -> float:
    """Seconds by its own clock: our cluster was started before, so is its Python."""
    shutil.rmtree(output, ignore_errors=True)
    command = [python, "-c", _IMG2DATASET, str(urls), str(output), str(processes)]
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.rpartition("seconds ")[2])


def _draw(folder: Path, count: int) -> None:
    """Paintings of three sizes; a few are drawn, the others are theirs, shifted and with other grain."""
    drawn = folder.parent / "drawn"
    generate_paintings(drawn, 6, seed=0, size=960)
    pictures = [Image.open(path).convert("RGB").resize(_SIZES[0]) for path in sorted(drawn.iterdir())]
    folder.mkdir()
    for number in range(count):
        width, height = _SIZES[number % len(_SIZES)]
        picture = pictures[number % len(pictures)].resize((width, height))
        shifted = np.roll(np.asarray(picture), number, axis=1)
        grain = np.random.default_rng(number).integers(-6, 7, (height // 4, width // 4, 1)).repeat(4, 0).repeat(4, 1)
        noisy = (shifted.astype(np.int16) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:05d}.jpg", quality=90)
