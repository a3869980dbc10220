"""Shards to batches: random reads from plain tars by the manifest's offsets, decoded and cropped in worker processes.

    PairDataset[step] -> Batch     one rank's share of the global batch of a step: a pure function, so a loader
                                   that starts at any step gives what an unbroken one would have given
    make_loader(...)  -> iterator  the same in order, ahead of time, in worker processes

Letters: n pairs of a rank's share, S side of the crop.
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from adaconv import storage
from adaconv.data.order import StreamOrder, rank_slice, stable_seed
from adaconv.errors import DatasetError

if TYPE_CHECKING:
    from adaconv.data.manifest import DatasetVersion


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

    content, style: (n, 3, S, S) uint8, RGB. Pairs are unrelated images; row i of both is one pair.
    """

    step: int
    content: Tensor
    style: Tensor
    content_keys: list[str]
    style_keys: list[str]

    def pin_memory(self) -> Batch:  # called by DataLoader
        return Batch(self.step, self.content.pin_memory(), self.style.pin_memory(), self.content_keys, self.style_keys)


def decode_crop(data: bytes, geometry: Geometry, draw: random.Random) -> NDArray[np.uint8]:
    """Decode an image and take a random square of it: (S, S, 3) uint8.

    The result is that of scaling the shorter side to `resize` and cropping, computed from the crop's own pixels: a JPEG
    of twice the size or more is decoded at a fraction of it, and only the crop is resampled (bicubic).
    """
    # Drawn before anything is decoded: the same numbers whatever the image.
    across, down, mirrored, turns = draw.random(), draw.random(), draw.random() < 0.5, draw.randrange(4)
    with Image.open(io.BytesIO(data)) as image:
        stored = image.size
        if image.format == "JPEG":
            wide, high = (-(-geometry.resize * side // min(stored)) for side in stored)
            image.draft("RGB", (wide, high))
        scale = min(image.size) / geometry.resize
        side = geometry.crop * scale
        left, top = across * (image.width - side), down * (image.height - side)
        if scale == 1:  # nothing to resample: whole pixels, as shards made for this size have them
            left, top = round(left), round(top)
            square = image.convert("RGB").crop((left, top, left + geometry.crop, top + geometry.crop))
        else:
            square = image.convert("RGB").resize(
                (geometry.crop, geometry.crop), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
            )
    pixels = np.asarray(square)
    if geometry.flip and mirrored:
        pixels = pixels[:, ::-1]
    if geometry.rotate:
        pixels = np.rot90(pixels, turns)
    return pixels


class SampleReader:
    """Reads the bytes of any sample of a dataset version from its tars. Open files stay open; safe to pickle."""

    def __init__(self, version: DatasetVersion, *, cache_dir: str | None = None) -> None:
        samples = version.samples()
        self._version, self._cache_dir = version, cache_dir
        self.keys: list[str] = samples["key"].to_pylist()
        self._shards: list[str] = samples["shard"].to_pylist()
        self._offsets: NDArray[np.int64] = samples["offset"].to_numpy().astype(np.int64)
        self._sizes: NDArray[np.int64] = samples["size"].to_numpy().astype(np.int64)
        self._files: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # a file descriptor means nothing in another process

    def read(self, row: int) -> bytes:
        """The image's bytes as they lie in the shard.

        Raises:
            DatasetError: the shard ends before the sample does.
        """
        shard = self._shards[row]
        if shard not in self._files:
            uri = self._version.shard_uri(shard)
            path = storage.local_copy(uri, cache_dir=self._cache_dir)
            self._files[shard] = os.open(path, os.O_RDONLY)
        size = int(self._sizes[row])
        data = os.pread(self._files[shard], size, int(self._offsets[row]))
        if len(data) != size:
            raise DatasetError(
                f"{self._version.shard_uri(shard)}: expected {size} bytes of sample {self.keys[row]} at offset "
                f"{self._offsets[row]}, found {len(data)}; `pipelines/dataset.py verify` locates the damage"
            )
        return data


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
        cache_dir: str | None = None,
    ) -> None:
        self._seed, self._global_batch_size = seed, global_batch_size
        self._slice = rank_slice(global_batch_size, rank, num_ranks)
        self._streams = {
            name: (
                SampleReader(version, cache_dir=cache_dir),
                StreamOrder(
                    [shard.rows for shard in version.shards], seed, name, global_batch_size, partitions, block_shards
                ),
                geometry,
            )
            for name, version, geometry in (("content", content, content_geometry), ("style", style, style_geometry))
        }

    def __getitem__(self, step: int) -> Batch:
        content, content_keys = self._share("content", step)
        style, style_keys = self._share("style", step)
        return Batch(step, content, style, content_keys, style_keys)

    def _share(self, stream: str, step: int) -> tuple[Tensor, list[str]]:
        reader, order, geometry = self._streams[stream]
        rows = order.batch(step)[self._slice]
        keys, crops = [], []
        for position, row in enumerate(rows.tolist(), start=self._slice.start):
            sample = step * self._global_batch_size + position  # counts over all ranks: the crop is the sample's own
            draw = random.Random(stable_seed(self._seed, stream, sample))
            keys.append(reader.keys[row])
            try:
                crops.append(decode_crop(reader.read(row), geometry, draw))
            except OSError as error:
                raise DatasetError(f"{stream} sample {reader.keys[row]} cannot be decoded: {error}") from error
        pixels = torch.from_numpy(np.stack(crops))  # (n, S, S, 3)
        return pixels.permute(0, 3, 1, 2).contiguous(), keys


def make_loader(
    dataset: PairDataset, *, first_step: int, steps: int, workers: int, prefetch_batches: int, pin_memory: bool
) -> Iterator[Batch]:
    """Batches of the steps first_step ... steps - 1 in order, decoded ahead in `workers` processes."""
    loader = DataLoader(
        dataset,
        batch_size=None,  # an item is a batch already
        sampler=range(first_step, steps),
        num_workers=workers,
        prefetch_factor=prefetch_batches if workers else None,
        pin_memory=pin_memory,
        # A Ray worker runs threads that a forked child would find stopped half-way.
        multiprocessing_context="spawn" if workers else None,
    )
    return iter(loader)
