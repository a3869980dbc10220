"""A batch of 256 px crops from shards, decoded in this process: against full decode, resize, crop as peers do."""

import io
import random
import shutil
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from adaconv.data.loader import Geometry, decode_crop
from bench.measure import Row, alternate

_IMAGES = 32


def rows(quick: bool) -> list[Row]:
    folder = Path(tempfile.mkdtemp(prefix="adaconv-bench-"))
    try:
        return [_row(folder, rounds=3 if quick else 9)]
    finally:
        shutil.rmtree(folder)


def _row(folder: Path, rounds: int) -> Row:
    tar, places = _shard(folder)
    geometry = Geometry(resize=512, crop=256, flip=True)

    def ours() -> None:
        with tar.open("rb", buffering=0) as file:
            for number, (offset, size) in enumerate(places):
                file.seek(offset)
                decode_crop(file.read(size), geometry, random.Random(number))

    def resize_then_crop() -> None:
        with tarfile.open(tar) as file:
            for number, member in enumerate(file):
                draw = random.Random(number)
                with Image.open(io.BytesIO(_bytes_of(file, member))) as image:
                    scale = geometry.resize / min(image.size)
                    size = (round(image.width * scale), round(image.height * scale))
                    whole = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
                left, top = (round(draw.random() * (side - geometry.crop)) for side in whole.size)
                np.asarray(whole.crop((left, top, left + geometry.crop, top + geometry.crop)))

    def decode_only() -> None:
        with tar.open("rb", buffering=0) as file:
            for offset, size in places:
                file.seek(offset)
                Image.open(io.BytesIO(file.read(size))).load()

    seconds = alternate(ours, resize_then_crop, rounds=rounds)
    floor, _ = alternate(decode_only, lambda: None, rounds=rounds)
    unit = f"{_IMAGES} images of 683x512, one process; the floor is libjpeg's decoding alone"
    return Row("load", *seconds, floor=floor, unit=unit)


def _bytes_of(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def _shard(folder: Path) -> tuple[Path, list[tuple[int, int]]]:
    generator = np.random.default_rng(0)
    path = folder / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(_IMAGES):
            small = Image.fromarray(generator.integers(0, 256, (32, 43, 3), dtype=np.uint8))
            picture = small.resize((683, 512), Image.Resampling.BICUBIC)  # smooth: about 1 bit a pixel, as photographs
            grain = generator.normal(0, 8, (512, 683, 3))
            picture = Image.fromarray((np.asarray(picture) + grain).clip(0, 255).astype(np.uint8))
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=90)
            info = tarfile.TarInfo(f"{number:03d}.jpg")
            info.size = buffer.tell()
            tar.addfile(info, io.BytesIO(buffer.getvalue()))
    with tarfile.open(path) as tar:
        return path, [(member.offset_data, member.size) for member in tar]
