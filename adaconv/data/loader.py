"""Shards to batches: random reads from plain tars by the manifest's offsets, decoded and cropped in worker processes.

    PairDataset[step] -> Batch     one rank's share of the global batch of a step: a pure function, so a loader
                                   that starts at any step gives what an unbroken one would have given
    make_loader(...)  -> iterator  the same in order, ahead of time, in worker processes

Letters: n pairs of a rank's share, S side of the crop.
"""

from __future__ import annotations

import contextlib
import io
import math
import multiprocessing
import multiprocessing.context
import os
import random
import sys
import tarfile
import threading
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from adaconv import storage
from adaconv.data import loader_witness
from adaconv.data.order import StreamOrder, batch_of_step, rank_slice, stable_seed
from adaconv.data.shard_cache import ShardCache, ShardPrefetcher, default_cache_dir
from adaconv.errors import AdaConvError, DatasetError
from adaconv.scratch import scratch_folder

try:
    import simplejpeg
except ImportError:  # Pillow gives the same pixels, more slowly; a bare GPU machine may have nothing else
    simplejpeg = None

if TYPE_CHECKING:
    from adaconv.data.manifest import DatasetVersion, Shard


@dataclass(frozen=True)
class Geometry:
    """How a stored image becomes a square crop; see DataConfig for the fields."""

    resize: int
    crop: int
    flip: bool
    rotate: bool = False


@dataclass
class Batch:
    """One rank's share of a global batch.

    images: (2, n, 3, S, S) uint8, RGB, contents before styles; in memory the three bytes of a pixel lie side by side.
    Both are in one tensor, because each costs a handshake between the process that decodes and the one that trains.
    """

    step: int
    images: Tensor
    content_keys: list[str]
    style_keys: list[str]

    @property
    def content(self) -> Tensor:
        """(n, 3, S, S) uint8. Pairs are unrelated images; row i of both is one pair."""
        return self.images[0]

    @property
    def style(self) -> Tensor:
        """(n, 3, S, S) uint8."""
        return self.images[1]

    def pin_memory(self) -> Batch:  # called by DataLoader
        return replace(self, images=self.images.pin_memory())


def decode_crop(data: bytes, geometry: Geometry, draw: random.Random) -> NDArray[np.uint8]:
    """Decode an image and take a random square of it: (S, S, 3) uint8.

    The result is that of scaling the shorter side to `resize` and cropping, computed from the crop's own pixels: a JPEG
    of twice the size or more is decoded at a fraction of it, and only the crop is resampled (bicubic).
    """
    # Drawn before anything is decoded: the same numbers whatever the image.
    across, down, mirrored, turns = draw.random(), draw.random(), draw.random() < 0.5, draw.randrange(4)
    whole = _decode(data, geometry.resize)
    height, width = whole.shape[:2]
    scale = min(width, height) / geometry.resize
    side = min(geometry.crop * scale, width, height)  # where the crop is the whole side, the product may round above it
    left, top = across * (width - side), down * (height - side)
    if scale == 1:  # nothing to resample: whole pixels, as shards made for this size have them
        x, y = round(left), round(top)
        pixels = whole[y : y + geometry.crop, x : x + geometry.crop]
    else:
        pixels = _resample(whole, left, top, side, geometry.crop)
    if geometry.flip and mirrored:
        pixels = torch.from_numpy(pixels).flip(1).numpy()  # numpy copies a mirrored view 17 times as slowly
    if geometry.rotate:
        pixels = np.rot90(pixels, turns)
    return pixels


def _decode(data: bytes, resize: int) -> NDArray[np.uint8]:
    """(H, W, 3) uint8, of the stored size or, of a JPEG much larger than `resize`, a half, a quarter or an eighth."""
    with Image.open(io.BytesIO(data)) as image:
        if image.format == "JPEG":
            stored = image.size
            wide, high = (-(-resize * side // min(stored)) for side in stored)
            image.draft("RGB", (wide, high))
            if simplejpeg is not None and image.size == stored and image.mode == "RGB":
                # The same library and the same pixels (tests/data/test_loader.py) without Pillow's copies.
                with contextlib.suppress(ValueError):  # what it is strict about, Pillow decides
                    return simplejpeg.decode_jpeg(data, "RGB")  # type: ignore[no-any-return]
        return np.array(image.convert("RGB"))


def _resample(whole: NDArray[np.uint8], left: float, top: float, side: float, crop: int) -> NDArray[np.uint8]:
    """The square of `side` pixels at (left, top) as crop x crop, bicubic."""
    reach = math.ceil(2 * max(1.0, side / crop)) + 1  # of the filter, beyond the square
    x, y = max(0, math.floor(left) - reach), max(0, math.floor(top) - reach)
    part = whole[y : math.ceil(top + side) + reach, x : math.ceil(left + side) + reach]
    box = (left - x, top - y, left - x + side, top - y + side)
    square = Image.fromarray(np.ascontiguousarray(part)).resize((crop, crop), Image.Resampling.BICUBIC, box=box)
    return np.array(square)


class _Table:
    """Columns of arrays. Who is handed it, by pickle, maps files of it while it is there: workers need no copies."""

    def __init__(self, columns: Mapping[str, NDArray[Any]]) -> None:
        self._columns = columns
        self._folder: Path | None = None

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._columns[name]

    def __getstate__(self) -> dict[str, Any]:
        if self._folder is None:
            ending = contextlib.ExitStack()
            folder = ending.enter_context(scratch_folder("samples"))
            weakref.finalize(self, ending.close)
            with storage.full_disk_named(str(folder)):
                for name, values in self._columns.items():
                    np.save(folder / f"{name}.npy", values)
            self.__setstate__({"folder": folder})
        return {"folder": self._folder}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        folder: Path = state["folder"]
        self._folder, self._columns = folder, {file.stem: np.load(file, mmap_mode="r") for file in folder.iterdir()}


class SampleReader:
    """Reads the bytes of any sample of a dataset version from its tars. Holds no files.

    What is pickled of it can be read for as long as it is there, on its machine.

    Args:
        version: whose samples are read.
        cache: of shards that do not lie on a disk; None: one in the system's temporary folder, without a limit.
        verify: compare each sample with its checksum. A shard that is fetched is compared with its sha256 anyway.
    """

    def __init__(self, version: DatasetVersion, *, cache: ShardCache | None = None, verify: bool = False) -> None:
        columns = ["offset", "size", *(["span", "crc32"] if verify else [])]
        samples = version.samples(["key", *columns])
        self._version, self._verify = version, verify
        self.cache = cache or ShardCache(default_cache_dir(), sys.maxsize)
        # 48 bytes a sample, where strings would take a hundred.
        keys = np.array(samples["key"].to_pylist(), np.bytes_)
        self._table = _Table({"key": keys, **{name: samples[name].to_numpy().astype(np.int64) for name in columns}})
        self._first_rows = np.cumsum([0, *(shard.rows for shard in version.shards)])

    def __len__(self) -> int:
        """Samples of the version."""
        return len(self._table["key"])

    def key(self, row: int) -> str:
        return bytes(self._table["key"][row]).decode()

    def read(self, row: int) -> bytes:
        """The image's bytes as they lie in the shard.

        Raises:
            DatasetError: the shard is not there, ends before the sample does, or holds other bytes.
        """
        uri, shard = self.shard_of(row)
        size, offset = int(self._table["size"][row]), int(self._table["offset"][row])
        if self._verify:
            self._check(row, uri, shard)
        data = self._read_at(uri, shard, offset, size)
        if len(data) != size:
            raise DatasetError(
                f"{uri}: expected {size} bytes of sample {self.key(row)} at offset {offset}, found {len(data)}; "
                "`pipelines/dataset.py verify` locates the damage"
            )
        return data

    def _check(self, row: int, uri: str, shard: Shard) -> None:
        """Of all that a sample takes in its tar, headers included, as the manifest has it."""
        offset = int(self._table["offset"][row]) - tarfile.BLOCKSIZE
        if zlib.crc32(self._read_at(uri, shard, offset, int(self._table["span"][row]))) != self._table["crc32"][row]:
            raise DatasetError(
                f"{uri}: the bytes of sample {self.key(row)} at offset {offset} are not those that were written "
                "(their checksum differs); `pipelines/dataset.py verify` says what is damaged"
            )

    def shard_of(self, row: int) -> tuple[str, Shard]:
        """Where a sample lies."""
        shard = self._version.shards[int(np.searchsorted(self._first_rows, row, side="right")) - 1]
        return self._version.shard_uri(shard.name), shard

    def _read_at(self, uri: str, shard: Shard, offset: int, size: int) -> bytes:
        # Opened for each sample, which costs little beside its decoding: a copy that made room for others while it was
        # open would go on taking its place on the disk.
        for attempt in (1, 2, 3):
            try:
                file = os.open(self.cache.path(uri, shard), os.O_RDONLY)
            except FileNotFoundError:
                if attempt < 3 and not storage.is_local(uri):
                    continue  # made room for another one between the two calls
                raise DatasetError(
                    f"expected shard {uri}, found none there; `pipelines/dataset.py verify` says what is missing"
                ) from None
            try:
                return os.pread(file, size, offset)
            except OSError as error:
                error.filename = uri  # a disk that fails knows no path
                raise
            finally:
                os.close(file)
        raise AssertionError


class PairDataset(Dataset[Batch]):
    """Item t is the given rank's share of the global batch of step t, for any t >= 0."""

    def __init__(
        self,
        content: DatasetVersion,
        style: DatasetVersion,
        *,
        seed: int,
        global_batch_size: int,
        content_geometry: Geometry,
        style_geometry: Geometry,
        rank: int = 0,
        num_ranks: int = 1,
        partitions: int = 1,
        block_shards: int = 8,
        skipped: Sequence[tuple[int, int]] = (),
        cache: ShardCache | None = None,
        verify: bool = False,
    ) -> None:
        self._seed, self._global_batch_size = seed, global_batch_size
        self._skipped = skipped
        self._slice = rank_slice(global_batch_size, rank, num_ranks)
        self.cache = cache or ShardCache(default_cache_dir(), sys.maxsize)
        self.cache_share = self.cache.limit_bytes // min(num_ranks, partitions)  # ranks of other partitions have theirs
        self._streams = {
            name: (
                SampleReader(version, cache=self.cache, verify=verify),
                StreamOrder(
                    [shard.rows for shard in version.shards], seed, name, global_batch_size, partitions, block_shards
                ),
                geometry,
            )
            for name, version, geometry in (("content", content, content_geometry), ("style", style, style_geometry))
        }
        # An order keeps the epoch it was last asked about; who looks ahead has some of his own.
        self._orders_ahead = {name: replace(order) for name, (_, order, _) in self._streams.items()}
        self.is_local = storage.is_local(content.root) and storage.is_local(style.root)

    def __getitem__(self, step: int) -> Batch:
        geometry, pairs = self._streams["content"][2], self._slice.stop - self._slice.start
        pixels = torch.empty(2, pairs, geometry.crop, geometry.crop, 3, dtype=torch.uint8)
        batch = batch_of_step(step, self._skipped)
        content_keys = self._decode_share("content", batch, pixels[0])
        style_keys = self._decode_share("style", batch, pixels[1])
        return Batch(step, pixels.permute(0, 1, 4, 2, 3), content_keys, style_keys)

    def shards_of(self, step: int) -> list[tuple[str, Shard]]:
        """The shards that this rank reads in a step. Not for two threads at once."""
        found = {}
        for name, order in self._orders_ahead.items():
            reader = self._streams[name][0]
            for row in order.batch(batch_of_step(step, self._skipped))[self._slice].tolist():
                uri, shard = reader.shard_of(row)
                found[uri] = shard
        return list(found.items())

    def _decode_share(self, stream: str, batch: int, out: Tensor) -> list[str]:
        """This rank's images of a stream into `out`, (n, S, S, 3) uint8; their keys."""
        reader, order, geometry = self._streams[stream]
        rows = order.batch(batch)[self._slice].tolist()
        # Counts over all ranks: a crop belongs to the sample, whoever makes it.
        first_sample = batch * self._global_batch_size + self._slice.start
        try:
            for sample, (row, place) in enumerate(zip(rows, out.numpy(), strict=True), start=first_sample):
                draw = random.Random(stable_seed(self._seed, stream, sample))
                loader_witness.note(f"{stream} sample {reader.key(row)} of {reader.shard_of(row)[0]}")
                image = reader.read(row)
                try:
                    place[:] = decode_crop(image, geometry, draw)
                except (OSError, ValueError) as error:
                    raise DatasetError(f"{stream} sample {reader.key(row)} cannot be decoded: {error}") from error
        finally:
            loader_witness.note("")
        return [reader.key(row) for row in rows]


def make_loader(
    dataset: PairDataset,
    *,
    first_step: int,
    steps: int,
    workers: int,
    prefetch_batches: int,
    pin_memory: bool,
    timeout_seconds: float = 0,
) -> Iterator[Batch]:
    """Batches of the steps first_step ... steps - 1 in order, decoded ahead in `workers` processes.

    Raises:
        RuntimeError: a worker process ended, or gave nothing for `timeout_seconds` (0 waits for ever), and what it
            was at; see `is_lost_worker`.
        AdaConvError, OSError: what the dataset raised.
    """
    context = _context() if workers else None
    seen = loader_witness.witnesses(context, workers) if context else []
    loader = DataLoader(
        _Telling(dataset),
        batch_size=None,  # an item is a batch already
        sampler=range(first_step, steps),
        num_workers=workers,
        prefetch_factor=prefetch_batches if workers else None,
        pin_memory=pin_memory,
        timeout=timeout_seconds if workers else 0,
        multiprocessing_context=context,
        worker_init_fn=partial(_set_up_worker, environment=dict(os.environ), seen=seen) if workers else None,
    )
    return _Batches(iter(loader), seen)  # workers begin now


class _Batches(Iterator[Batch]):
    def __init__(self, given: Iterator[Batch | Exception], seen: Sequence[Any]) -> None:
        self._given, self._seen = given, seen

    def __next__(self) -> Batch:
        try:
            given = next(self._given)
        except RuntimeError as error:
            if "timed out" in str(error) and (told := loader_witness.told(self._seen)):
                raise RuntimeError(f"{error}; {told}") from error
            raise
        if isinstance(given, Exception):
            raise given
        return given


def is_lost_worker(error: Exception) -> bool:
    """Whether a worker process died or hangs; PyTorch says so in plain RuntimeErrors."""
    text = str(error)
    lost = ("is killed by signal", "exited unexpectedly", "DataLoader timed out")
    return isinstance(error, RuntimeError) and text.startswith("DataLoader") and any(word in text for word in lost)


class _Telling(Dataset[Batch | Exception]):
    """Gives what users are to read as a value: PyTorch would make the worker's whole traceback its message."""

    def __init__(self, dataset: PairDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, step: int) -> Batch | Exception:
        try:
            return self._dataset[step]
        except (AdaConvError, OSError) as error:
            return error


def _context() -> multiprocessing.context.BaseContext:
    """Workers are forked from a process that has imported what they need: one import for all, and one copy of it.

    Not from this one: a Ray worker runs threads that a forked child would find stopped half-way.
    """
    context = multiprocessing.get_context("forkserver")
    # A child imports its parent's main module again, and that of a Ray worker imports Ray.
    context.set_forkserver_preload([__name__, *(["ray"] if "ray" in sys.modules else [])])
    return context


def _set_up_worker(worker: int, *, environment: Mapping[str, str], seen: Sequence[Any]) -> None:
    """A worker's environment, who sees what it does, and its own look at the process that reads its batches.

    It was forked from one that began with the first loader: the environment is that one's. And PyTorch looks at that
    one, which lives as long as its children, who would wait for each other for ever once the reader was killed.
    """
    os.environ.update(environment)
    loader_witness.bear(seen[worker])
    reader = multiprocessing.parent_process()
    assert reader is not None

    def wait() -> None:
        reader.join()
        os._exit(1)

    threading.Thread(target=wait, name="reader", daemon=True).start()


def prefetching(dataset: PairDataset, *, ahead: int) -> contextlib.AbstractContextManager[ShardPrefetcher]:
    """Fetch the shards of coming steps while the block runs and says, by `follow(step)`, where it is.

    On a disk there is nothing to fetch, and nothing is done.
    """
    return contextlib.closing(
        ShardPrefetcher(
            dataset.shards_of,
            dataset.cache,
            ahead=0 if dataset.is_local else ahead,
            limit_bytes=dataset.cache_share,
        )
    )
