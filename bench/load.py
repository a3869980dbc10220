"""Batches of 256 px pairs from shards through the loader, by two processes: against other loaders on the same shards.

    load             bare decode + crop by the same function in two processes, no shards, no batches: the limit
    load/webdataset  webdataset's loader: its own pipeline in a DataLoader, Pillow, resize, crop
    load/ray_data    Ray Data's: read_webdataset, map_batches, iter_torch_batches
    load/one_image   decode_crop alone in this process: against Pillow's decode, resize, crop as peers do

Seconds are of one pass over all images. The floor of every row is libjpeg's decoding alone.
"""

import io
import os
import random
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from adaconv.data.loader import Geometry, PairDataset, decode_crop, make_loader
from bench.measure import Row, alternate

_SIDE, _CROP, _BATCH, _PROCESSES = 512, 256, 8, 2
_GEOMETRY = Geometry(resize=_SIDE, crop=_CROP, flip=True)
_COLUMNS = ("key", "offset", "size", "span", "crc32")


def rows(quick: bool, *, against: str) -> Iterator[Row]:
    folder = Path(tempfile.mkdtemp(prefix="adaconv-bench-"))
    try:
        shards = _draw(folder, shards=8, images=4 if quick else 400)
        yield _ROWS[against](shards, 1 if quick else 5)
    finally:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class _Shard:
    name: str
    path: str
    rows: int
    bytes: int
    sha256: str
    places: tuple[tuple[str, int, int], ...]  # key, offset, size


class _Version:
    """What the loader asks of a dataset version, without the Parquet that a bare GPU machine cannot read."""

    def __init__(self, shards: list[_Shard]) -> None:
        self.shards, self.root = tuple(shards), str(Path(shards[0].path).parent)

    def shard_uri(self, name: str) -> str:
        return str(Path(self.root) / name)

    def samples(self, columns: list[str]) -> dict[str, Any]:
        rows = [(key, offset, size, 0, 0) for shard in self.shards for key, offset, size in shard.places]
        return {name: _Column(column) for name, column in zip(_COLUMNS, zip(*rows, strict=True), strict=True)}


class _Column(list[Any]):
    def to_pylist(self) -> list[Any]:
        return list(self)

    def to_numpy(self) -> Any:
        return np.asarray(self)


def _loader_row(shards: list[_Shard], rounds: int) -> Row:
    ours, close = _ours(shards)
    with ProcessPoolExecutor(_PROCESSES, mp_context=get_context("spawn")) as pool:
        parts = _parts(shards)

        def bare() -> None:
            list(pool.map(partial(_decode_all, crop=True), parts))

        def decoding() -> None:
            list(pool.map(partial(_decode_all, crop=False), parts))

        ours_seconds, peers_seconds, floor = alternate(ours, bare, decoding, rounds=rounds)
    close()
    return Row(
        "load",
        ours_seconds,
        peers_seconds,
        floor=floor,
        unit=_unit(shards),
        against="decode + crop alone, the same functions",
    )


def _webdataset_row(shards: list[_Shard], rounds: int) -> Row:
    import webdataset

    def passing() -> None:
        urls = [shard.path for shard in shards]
        dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(100).map(_PeersSample())
        loader = webdataset.WebLoader(dataset.batched(_BATCH), batch_size=None, num_workers=_PROCESSES)
        for _ in loader:
            pass

    return _against(shards, rounds, passing, "load/webdataset", "webdataset's loader, Pillow, resize, crop")


def _ray_data_row(shards: list[_Shard], rounds: int) -> Row:
    os.environ.setdefault("RAY_worker_niceness", "0")
    from adaconv.orchestration.cluster import connect, set_up_ray_data

    with connect(object_store_mb=1500):
        import ray.data

        set_up_ray_data()

        def passing() -> None:
            data = ray.data.read_webdataset([shard.path for shard in shards], decoder=None, shuffle="files")
            data = data.map_batches(_peers_batch, batch_size=_BATCH * 4, batch_format="numpy")
            for _ in data.iter_torch_batches(batch_size=_BATCH, local_shuffle_buffer_size=100):
                pass

        return _against(shards, rounds, passing, "load/ray_data", "Ray Data's read_webdataset, Pillow, resize, crop")


def _one_image_row(shards: list[_Shard], rounds: int) -> Row:
    images = [_bytes_of(shards[0], offset, size) for _, offset, size in shards[0].places]

    def ours() -> None:
        for number, data in enumerate(images):
            decode_crop(data, _GEOMETRY, random.Random(number))

    def peers() -> None:
        for data in images:
            _as_peers_do(data)

    def decoding() -> None:
        for data in images:
            Image.open(io.BytesIO(data)).load()

    ours_seconds, peers_seconds, floor = alternate(ours, peers, decoding, rounds=rounds)
    unit = f"{len(images)} images of {_size_text()}, one process"
    return Row(
        "load/one_image", ours_seconds, peers_seconds, floor=floor, unit=unit, against="Pillow: decode, resize, crop"
    )


_ROWS: dict[str, Callable[[list[_Shard], int], Row]] = {
    "bare": _loader_row,
    "webdataset": _webdataset_row,
    "ray_data": _ray_data_row,
    "one_image": _one_image_row,
}


def _against(shards: list[_Shard], rounds: int, passing: Callable[[], None], name: str, against: str) -> Row:
    ours, close = _ours(shards)
    with ProcessPoolExecutor(_PROCESSES, mp_context=get_context("spawn")) as pool:
        parts = _parts(shards)

        def decoding() -> None:
            list(pool.map(partial(_decode_all, crop=False), parts))

        ours_seconds, peers_seconds, floor = alternate(ours, passing, decoding, rounds=rounds)
    close()
    return Row(name, ours_seconds, peers_seconds, floor=floor, unit=_unit(shards), against=against)


def _ours(shards: list[_Shard]) -> tuple[Callable[[], None], Callable[[], None]]:
    """A pass over all images, content and style half each, through a loader that lives as long as a run does."""
    half = len(shards) // 2
    version: Any = _Version
    dataset = PairDataset(
        version(shards[:half]),
        version(shards[half:]),
        seed=0,
        global_batch_size=_BATCH,
        content_geometry=_GEOMETRY,
        style_geometry=_GEOMETRY,
    )
    steps = sum(shard.rows for shard in shards[:half]) // _BATCH
    ahead = 2
    batches = make_loader(
        dataset, first_step=0, steps=10**9, workers=_PROCESSES, prefetch_batches=ahead, pin_memory=False
    )

    def one_pass() -> None:
        # What was decoded while the other side had its turn is taken besides: it must not count as done in this one.
        for _ in range(steps + ahead * _PROCESSES):
            next(batches)

    def close() -> None:
        nonlocal batches
        del batches

    return one_pass, close


def _parts(shards: list[_Shard]) -> list[list[_Shard]]:
    return [shards[start::_PROCESSES] for start in range(_PROCESSES)]


def _decode_all(shards: list[_Shard], *, crop: bool) -> None:
    torch.set_num_threads(1)
    geometry = _GEOMETRY if crop else replace(_GEOMETRY, crop=8)
    for shard in shards:
        for number, (_, offset, size) in enumerate(shard.places):
            decode_crop(_bytes_of(shard, offset, size), geometry, random.Random(number)).copy()


def _bytes_of(shard: _Shard, offset: int, size: int) -> bytes:
    with open(shard.path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), size, offset)


class _PeersSample:
    def __call__(self, sample: dict[str, Any]) -> torch.Tensor:
        return _as_peers_do(sample["jpg"])


def _peers_batch(batch: dict[str, Any]) -> dict[str, Any]:
    return {"image": np.stack([_as_peers_do(data).numpy() for data in batch["jpg"]])}


def _as_peers_do(data: bytes) -> torch.Tensor:
    """Decode, scale the shorter side, crop, as torchvision's transforms on Pillow images: (3, S, S) uint8."""
    with Image.open(io.BytesIO(data)) as image:
        scale = _SIDE / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        whole = image.convert("RGB")
        if size != whole.size:
            whole = whole.resize(size, Image.Resampling.BICUBIC)
    left, top = (random.randrange(side - _CROP + 1) for side in whole.size)
    pixels = np.array(whole.crop((left, top, left + _CROP, top + _CROP)))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _size_text() -> str:
    return f"{_SIDE * 4 // 3}x{_SIDE}"


def _unit(shards: list[_Shard]) -> str:
    return f"{sum(shard.rows for shard in shards)} images of {_size_text()}, {_PROCESSES} processes"


def _draw(folder: Path, *, shards: int, images: int) -> list[_Shard]:
    """Tars of JPEGs as `pipelines/shard.py` encodes them: quality 95, 4:4:4."""
    generator = np.random.default_rng(0)
    distinct = [_picture(generator) for _ in range(min(images, 24))]
    drawn = []
    for number in range(shards):
        path = folder / f"{number:03d}.tar"
        with tarfile.open(path, "w") as tar:
            for index in range(images):
                data = distinct[(index + number) % len(distinct)]
                info = tarfile.TarInfo(f"{number:02d}{index:04d}.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        with tarfile.open(path) as tar:
            places = tuple((member.name[:-4], member.offset_data, member.size) for member in tar)
        drawn.append(_Shard(path.name, str(path), images, path.stat().st_size, "", places))
    return drawn


def _picture(generator: np.random.Generator) -> bytes:
    small = Image.fromarray(generator.integers(0, 256, (32, 43, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((_SIDE * 4 // 3, _SIDE), Image.Resampling.BICUBIC)).astype(np.float64)
    grain = generator.normal(0, 4, smooth.shape[:2])[..., None]
    buffer = io.BytesIO()
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()
