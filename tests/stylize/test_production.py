"""One content to its outputs: memory that runs out, large files, broken files, what is kept of a content."""

import errno
import io
import os
import re
import struct
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import replace
from unittest.mock import Mock

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from adaconv import storage
from adaconv.images import ImageError, libvips
from adaconv.stylize import inputs, large, production
from adaconv.stylize.inputs import decode_picture
from adaconv.stylize.outputs import Recipe, read_recipe
from adaconv.stylize.production import Limits, Options, Production, Wanted, file_thumbnail
from adaconv.stylize.raster import Window
from adaconv.stylize.stylizer import Stylizer
from tests.helpers import grey_profile, held_open, save_checkpoint, swapped_profile
from tests.servers import REPO


def smooth(width, height, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def wanted(stylizer, count=1, **options):
    packs = [stylizer.style_pack(smooth(64, 64, seed + 1), side=32, source=f"s{seed}") for seed in range(count)]
    settings = Options(**options).__dict__
    return [
        Wanted(
            n,
            Recipe("c.jpg", "1" * 64, pack.source, "2" * 64, pack.digest, "m", stylizer.info.digest, settings),
            lambda pack=pack: pack,
            shown=True,
        )
        for n, pack in enumerate(packs)
    ]


def make(stylizer, root, path, outputs, **limits):
    return list(Production(lambda: stylizer, str(root), Limits(**limits)).make(path, outputs))


def pixels(root, one):
    with Image.open(root / one.recipe.name) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff"])
@pytest.mark.parametrize("color", ["style", "coral"])
def test_tiles_from_disk_to_disk_make_the_same_picture(stylizer, tmp_path, kind, color):
    smooth(170, 130).save(tmp_path / "c.png")
    outputs = wanted(stylizer, 2, format=kind, color=color, alpha=0.8)
    whole = make(stylizer, tmp_path / "whole", tmp_path / "c.png", outputs)
    tiled = make(stylizer, tmp_path / "tiled", tmp_path / "c.png", outputs, tile=64, scratch=tmp_path)
    assert [(one.state, one.width, one.height, one.tile) for one in whole] == [("done", 170, 130, None)] * 2
    assert [(one.state, one.width, one.height, one.tile) for one in tiled] == [("done", 170, 130, 64)] * 2
    for one in outputs:
        apart = np.abs(pixels(tmp_path / "whole", one) - pixels(tmp_path / "tiled", one))
        # What differs by rounding may differ more after it was compressed.
        assert apart.max() <= (1 if kind in ("png", "tiff") else 60)
        assert apart.mean() < 1
        recipe = read_recipe((tmp_path / "tiled" / one.recipe.name).read_bytes())
        assert recipe.made["tile"] == 64
    for one in (*whole, *tiled):
        with Image.open(io.BytesIO(one.thumbnail)) as image:
            assert max(image.size) == 170
    assert {path.name for path in tmp_path.iterdir()} == {"c.png", "whole", "tiled"}
    assert held_open(tmp_path) == []  # nor does a removed file take room: a worker makes thousands of pictures
    again = make(stylizer, tmp_path / "tiled", tmp_path / "c.png", outputs)
    assert [(one.state, one.width, one.height) for one in again] == [("skipped", 170, 130)] * 2
    assert again[0].thumbnail


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff"])
def test_an_output_on_an_object_store_is_not_read_whole_to_be_skipped(stylizer, tmp_path, monkeypatch, kind):
    smooth(170, 130).save(tmp_path / "c.png")
    outputs = [replace(one, shown=False) for one in wanted(stylizer, format=kind)]
    make(stylizer, tmp_path, tmp_path / "c.png", outputs)
    read_bytes, whole = storage.read_bytes, []
    monkeypatch.setattr(production, "_HEADER_BYTES", 4096)
    monkeypatch.setattr(storage, "is_local", lambda uri: False)
    monkeypatch.setattr(storage, "read_bytes", lambda uri: whole.append(uri) or read_bytes(uri))
    monkeypatch.setattr(storage, "_filesystem", lambda uri: fsspec.filesystem("file"))
    (made,) = make(stylizer, tmp_path, tmp_path / "c.png", outputs)
    assert (made.state, made.width, made.height) == ("skipped", 170, 130)
    assert len(whole) == (kind in ("webp", "tiff"))  # whose headers a part does not tell


def test_outputs_that_a_listing_found_cost_a_request_for_each_size(stylizer, tmp_path, monkeypatch):
    smooth(170, 130).save(tmp_path / "c.png")
    outputs = [replace(one, shown=False) for side in (None, 64) for one in wanted(stylizer, 3, content_side=side)]
    outputs = [replace(one, key=number) for number, one in enumerate(outputs)]
    made = make(stylizer, tmp_path, tmp_path / "c.png", outputs)
    (tmp_path / outputs[5].recipe.name).unlink()  # and no listing has it
    asked = []
    for name in ("size_of", "read_range", "read_bytes"):
        ask = getattr(storage, name)
        monkeypatch.setattr(storage, name, lambda uri, *a, ask=ask, name=name: asked.append(name) or ask(uri, *a))
    monkeypatch.setattr(storage, "is_local", lambda uri: False)
    monkeypatch.setattr(storage, "_filesystem", lambda uri: fsspec.filesystem("file"))
    there = {one.recipe.name for one in outputs[:5]}
    again = list(Production(lambda: stylizer, str(tmp_path), Limits(), there).make(tmp_path / "c.png", outputs))
    assert [(one.key, one.state) for one in again] == [(n, "skipped") for n in range(5)] + [(5, "done")]
    assert [(one.width, one.height) for one in again] == [(one.width, one.height) for one in made]
    assert asked == ["read_range", "read_range", "size_of"]


def test_what_a_listing_lacks_is_made_unseen_where_it_is_not_looked_for(stylizer, tmp_path, monkeypatch):
    smooth(96, 80).save(tmp_path / "c.png")
    outputs = wanted(stylizer, 2)
    make(stylizer, tmp_path, tmp_path / "c.png", outputs)
    monkeypatch.setattr(production, "is_whole", lambda uri: pytest.fail("a request"))
    there = {outputs[0].recipe.name}
    made = Production(lambda: stylizer, str(tmp_path), Limits(), there, look=False).make(tmp_path / "c.png", outputs)
    assert [(one.key, one.state) for one in made] == [(0, "skipped"), (1, "done")]


def test_batches_of_styles_are_halved_where_memory_runs_out_and_change_rounding_alone(stylizer, tmp_path, monkeypatch):
    smooth(96, 80).save(tmp_path / "c.png")
    outputs = wanted(stylizer, 5)
    make(stylizer, tmp_path / "one", tmp_path / "c.png", outputs)
    monkeypatch.setattr(Stylizer, "device", "cuda")  # CPUs are given no batches
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    decode, batches = stylizer.decode_batch, []

    def decode_little(encoded, packs):
        batches.append(len(packs))
        if len(packs) > 2:
            raise torch.OutOfMemoryError
        return decode(encoded, packs)

    monkeypatch.setattr(stylizer, "decode_batch", decode_little)
    make(stylizer, tmp_path / "many", tmp_path / "c.png", outputs, batch_size=4)
    assert batches == [4, 2, 2, 1]
    for one in outputs:
        assert np.abs(pixels(tmp_path / "one", one) - pixels(tmp_path / "many", one)).max() <= 1
    made = [read_recipe((tmp_path / "many" / one.recipe.name).read_bytes()).made for one in outputs]
    assert [(one["device"], one["gpu"], one["batch"]) for one in made] == [("cuda", "H200", n) for n in (2, 2, 2, 2, 1)]


def test_files_are_written_while_the_next_pictures_are_made(stylizer, tmp_path, monkeypatch):
    """The first output waits to be published until the network is at the fourth, and would wait for ever in its way."""
    smooth(96, 80).save(tmp_path / "c.png")
    outputs = wanted(stylizer, 8)
    decode, publish, at_the_fourth = stylizer.decode_batch, storage.publish_bytes, threading.Event()
    decoded, published, ahead = [], [], []

    def decode_and_tell(encoded, packs):
        decoded.append(packs)
        if len(decoded) == 4:
            at_the_fourth.set()
        return decode(encoded, packs)

    def publish_late(uri, data):
        assert at_the_fourth.wait(60)
        ahead.append(len(decoded) - len(published))
        publish(uri, data)
        published.append(uri)

    monkeypatch.setattr(stylizer, "decode_batch", decode_and_tell)
    monkeypatch.setattr(storage, "publish_bytes", publish_late)
    made = make(stylizer, tmp_path, tmp_path / "c.png", outputs, writers=2)
    assert [(one.key, one.state) for one in made] == [(n, "done") for n in range(8)]
    assert sorted(published) == sorted(f"{tmp_path}/{one.recipe.name}" for one in outputs)
    assert max(ahead) <= 2 * 2 + 2  # pictures that wait, besides what is being made and being written
    monkeypatch.undo()
    make(stylizer, tmp_path / "again", tmp_path / "c.png", outputs)
    for one in outputs:
        assert (tmp_path / one.recipe.name).read_bytes() == (tmp_path / "again" / one.recipe.name).read_bytes()


def test_memory_that_runs_out_has_nothing_made_twice(stylizer, tmp_path, monkeypatch):
    smooth(96, 80).save(tmp_path / "c.png")
    outputs = wanted(stylizer, 4)
    decode, publish, published = stylizer.decode_batch, storage.publish_bytes, []
    left = iter([True, True, False, True, True])

    def decode_some(encoded, packs):
        if not next(left):
            raise MemoryError
        return decode(encoded, packs)

    def publish_slowly(uri, data):
        time.sleep(0.1)
        publish(uri, data)
        published.append(uri)

    monkeypatch.setattr(stylizer, "decode_batch", decode_some)
    monkeypatch.setattr(storage, "publish_bytes", publish_slowly)
    made = make(stylizer, tmp_path, tmp_path / "c.png", outputs, writers=2)
    assert sorted((one.key, one.state, one.tile is None) for one in made) == [
        (0, "done", True), (1, "done", True), (2, "done", False), (3, "done", False)
    ]  # fmt: skip
    assert len(published) == 2  # tiles are published as files


def test_a_store_that_fails_ends_it_and_what_was_made_before_stands(stylizer, tmp_path, monkeypatch):
    smooth(96, 80).save(tmp_path / "c.png")
    outputs = wanted(stylizer, 4)
    publish = storage.publish_bytes

    def publish_all_but_one(uri, data):
        if outputs[2].recipe.name in uri:
            raise OSError("no room")
        publish(uri, data)

    monkeypatch.setattr(storage, "publish_bytes", publish_all_but_one)
    with pytest.raises(OSError, match="no room"):
        make(stylizer, tmp_path, tmp_path / "c.png", outputs)
    again = make(stylizer, tmp_path, tmp_path / "c.png", outputs[:2])
    assert [one.state for one in again] == ["skipped", "skipped"]


LITTLE_MEMORY = """
import logging, resource, sys, json
from pathlib import Path
sys.path.insert(0, "{repo}")
logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s")
from tests.stylize.test_production import *
import torch
torch.set_num_threads(1)
root = Path(sys.argv[1])
stylizer = Stylizer.from_folder(sys.argv[2], max_memory_gb=1000)
outputs = wanted(stylizer, 2)
make(stylizer, root / "warm", root / "small.png", outputs, tile=64)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = used + int(float(sys.argv[3]) * 1e6)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
made = make(stylizer, root / "out", root / "c.png", outputs)
print(json.dumps([(one.state, one.reason.partition(":")[0], one.tile) for one in made]))
"""


OUT_OF_MEMORY = '["failed", "out_of_memory", null]'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("megabytes", "answer"),
    [(150, '[["done", "", TILE], ["done", "", TILE]]'), (0.5, f"[{OUT_OF_MEMORY}, {OUT_OF_MEMORY}]")],
    ids=["tiles", "nothing"],
)
def test_memory_that_runs_out_leads_to_tiles_and_then_to_a_named_failure(tmp_path, megabytes, answer):
    """A limit of the system's own: 150 MB are not enough for the frame of 4 MP, and are for tiles of it."""
    smooth(2368, 1760).save(tmp_path / "c.png")
    smooth(64, 64).save(tmp_path / "small.png")
    script = LITTLE_MEMORY.format(repo=REPO)
    _, folder = save_checkpoint(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), folder, str(megabytes)],
        # The limit is on addresses: freed blocks are given back, so that they do not count.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.strip().splitlines()
    assert "out of memory with a batch of 1 and tiles of None; trying less" in lines[0]
    tiles = {str(side) for side in (1024, 512, 256, 128, 64)}
    assert lines[-1] in {answer.replace("TILE", side) for side in tiles}


def test_a_large_file_becomes_the_pixels_that_pillow_sees(tmp_path):
    picture = smooth(160, 96)
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "a.tif", compression="tiff_lzw")
    picture.save(tmp_path / "a.webp", lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    picture.convert("L").save(tmp_path / "grey.png")
    transparent = picture.copy()
    transparent.putalpha(Image.linear_gradient("L").resize(picture.size))
    transparent.save(tmp_path / "transparent.png")
    picture.convert("P").save(tmp_path / "palette.gif")
    told = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'  # which nobody asks
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", told.decode())
    picture.save(tmp_path / "xmp.png", pnginfo=text)
    picture.save(tmp_path / "xmp.jpg", xmp=told, quality=95)
    picture.save(tmp_path / "xmp.webp", xmp=told, lossless=True)
    picture.save(tmp_path / "xmp.tif", tiffinfo={700: told})
    grey = transparent.convert("LA")
    for kind in ("png", "tif"):
        grey.save(tmp_path / f"grey transparent.{kind}", icc_profile=grey_profile())
    picture.convert("L").save(tmp_path / "grey key.png", icc_profile=grey_profile(), transparency=100)
    Image.effect_noise((160, 96), 60).convert("I;16").save(tmp_path / "16bit.png")
    inks, print_profile = _inks(160, 96), bytes(libvips().Operation.call("profile_load", "cmyk"))
    for name, profile in (("plain", None), ("of rgb", swapped_profile()), ("of print", print_profile)):
        inks.save(tmp_path / f"cmyk {name}.tif", icc_profile=profile)
        inks.save(tmp_path / f"cmyk {name}.jpg", icc_profile=profile, quality=95)
    wide = libvips().Image.new_from_array(np.asarray(inks)).copy(interpretation="cmyk").cast("ushort", shift=True)
    wide.tiffsave(str(tmp_path / "cmyk 16bit.tif"))
    for name, profile in (("rgb", swapped_profile()), ("rgba", swapped_profile()), ("grey", grey_profile())):
        deep = {"rgb": picture, "rgba": transparent, "grey": picture.convert("L")}[name]
        deep = libvips().Image.new_from_array(np.asarray(deep).astype(np.uint16) * 257)
        deep = deep.copy(interpretation="grey16" if name == "grey" else "rgb16")
        deep.set_type(libvips().GValue.blob_type, "icc-profile-data", profile)
        deep.pngsave(str(tmp_path / f"{name} 16bit.png"), bitdepth=16)
        deep.tiffsave(str(tmp_path / f"{name} 16bit.tif"))
    for path in sorted(tmp_path.iterdir()):
        wanted = np.asarray(decode_picture(path, max_pixels=10**6)).astype(int)
        raster = large.unpack(path, tmp_path / "raw")
        found = raster.read(Window(0, raster.height, 0, raster.width))[0].permute(1, 2, 0).numpy()
        raster.close()
        assert found.shape == wanted.shape, path
        assert np.abs(found - wanted).max() <= (3 if path.suffix == ".jpg" else 1), path
        if not path.name.startswith("cmyk"):  # whose thumbnails are by libvips' own inks
            shown = np.asarray(Image.open(io.BytesIO(file_thumbnail(path, side=200))).convert("RGB"))
            assert np.abs(shown.mean(axis=(0, 1)) - wanted.mean(axis=(0, 1))).max() < 4, path


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room is not taken beforehand")
def test_a_full_disk_is_no_fault_of_the_content(stylizer, tmp_path, monkeypatch):
    smooth(96, 80).save(tmp_path / "c.png")
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", Mock(side_effect=full))
    with pytest.raises(OSError, match=r"No space left on device: '.*/content'"):
        make(stylizer, tmp_path / "out", tmp_path / "c.png", wanted(stylizer), tile=64, scratch=tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "c.png"]
    assert not any("content" in name for name in held_open(tmp_path))


def _inks(width, height):
    """CMYK with more of black than Pillow's own conversion, which makes none."""
    cyan, magenta, yellow, black = (smooth(width, height, seed).getchannel(0) for seed in range(4))
    return Image.merge("CMYK", (cyan, magenta, yellow, black.point(lambda level: level // 2)))


@pytest.mark.parametrize("name", ["c.bmp", "c.gif", "c.tif", "c.webp", "c.jpg"])
def test_every_format_of_contents_works_whole_and_in_tiles(stylizer, tmp_path, name):
    smooth(96, 80).save(tmp_path / name)
    for tile in (None, 64):
        (made,) = make(stylizer, tmp_path / str(tile), tmp_path / name, wanted(stylizer), tile=tile)
        assert (made.state, made.width, made.height) == ("done", 96, 80)
    assert file_thumbnail(tmp_path / name, side=50)


def test_an_odd_tag_of_a_turned_photograph_costs_nothing(stylizer, tmp_path):
    """ResolutionUnit as bytes and XResolution as text, which Pillow's exif_transpose does not survive."""
    entries = ((0x0112, 3, 1, b"\6\0\0\0"), (0x011A, 2, 4, b"abc\0"), (0x0128, 7, 1, b"\2\0\0\0"))
    directory = struct.pack("<H", 3) + b"".join(struct.pack("<HHI4s", *entry) for entry in entries) + bytes(4)
    smooth(96, 80).save(tmp_path / "c.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0" + directory)
    for tile in (None, 64):
        for keep in (False, True):
            outputs = wanted(stylizer, keep_metadata=keep)
            (made,) = make(stylizer, tmp_path / str(tile), tmp_path / "c.jpg", outputs, tile=tile)
            assert (made.state, made.width, made.height) == ("done", 80, 96)


@pytest.mark.parametrize("kind", ["cielab", "float", "float255", "int", "int255"])
def test_what_libvips_sees_otherwise_is_made_and_shown_as_pillow_sees_it(stylizer, tmp_path, kind):
    """It casts pixels of 32 bits, which say nothing of where white is."""
    picture = smooth(96, 80)
    levels = np.asarray(picture.convert("L"))
    if kind == "cielab":
        srgb, lab = (ImageCms.createProfile(name) for name in ("sRGB", "LAB"))
        ImageCms.profileToProfile(picture, srgb, lab, outputMode="LAB").save(tmp_path / "c.tif")
    else:
        dtype, whitest = (np.float32, 1) if "float" in kind else (np.int32, 65535)
        whitest = 255 if "255" in kind else whitest
        Image.fromarray((levels / 255 * whitest).astype(dtype)).save(tmp_path / "c.tif")
    one = wanted(stylizer)[0]
    for tile in (None, 64):
        (made,) = make(stylizer, tmp_path / str(tile), tmp_path / "c.tif", [one], tile=tile)
        assert (made.state, made.width, made.height) == ("done", 96, 80)
    assert np.abs(pixels(tmp_path / "None", one) - pixels(tmp_path / "64", one)).max() <= 1
    with Image.open(io.BytesIO(file_thumbnail(tmp_path / "c.tif", side=96))) as shown:
        assert np.abs(np.asarray(shown.convert("L")).astype(int) - levels).mean() < 4


def _tiff_of_channels(path, planes, *, photometric, extra):
    """An uncompressed TIFF of one strip: planes (H, W, C) uint8, and what its channels beyond the colours are."""
    height, width, channels = planes.shape
    shorts = lambda *values: struct.pack(f"<{len(values)}H", *values)  # noqa: E731
    wide = {258: shorts(*[8] * channels), 338: shorts(*extra)}
    entries = {256: width, 257: height, 258: None, 259: 1, 262: photometric, 273: None, 277: channels, 278: height}
    entries |= {279: planes.size} | ({338: None} if extra else {})
    behind = 8 + 2 + 12 * len(entries) + 4
    places, tail = {}, b""
    for tag, data in wide.items():
        if tag in entries and len(data) > 4:
            places[tag] = behind + len(tail)
            tail += data
    directory = struct.pack("<H", len(entries))
    for tag, value in sorted(entries.items()):
        if tag == 273:
            directory += struct.pack("<HHII", tag, 4, 1, behind + len(tail))
        elif tag in wide:
            count = len(wide[tag]) // 2
            where = struct.pack("<I", places[tag]) if tag in places else wide[tag].ljust(4, b"\0")
            directory += struct.pack("<HHI", tag, 3, count) + where
        else:
            directory += struct.pack("<HHII", tag, 4, 1, value)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + directory + bytes(4) + tail + planes.tobytes())


@pytest.mark.parametrize("kind", ["selection", "grey selection", "two selections", "ycbcr", "late exif"])
def test_channels_and_turns_that_libvips_sees_otherwise_are_as_pillow_sees_them(stylizer, tmp_path, kind):
    picture, path = smooth(96, 80), tmp_path / "c.tif"
    planes = np.asarray(picture)
    more = np.asarray(smooth(96, 80, 5).convert("L"))[..., None]
    wanted_size = (96, 80)
    match kind:
        case "selection":
            _tiff_of_channels(path, np.concatenate([planes, more], 2), photometric=2, extra=(0,))
        case "grey selection":
            grey = np.asarray(picture.convert("L"))[..., None]
            _tiff_of_channels(path, np.concatenate([grey, more], 2), photometric=1, extra=(0,))
        case "two selections":
            _tiff_of_channels(path, np.concatenate([planes, more, more], 2), photometric=2, extra=(0, 0))
        case "ycbcr":
            picture.convert("YCbCr").save(path)
        case _:
            path, wanted_size = tmp_path / "c.png", (80, 96)
            exif = Image.Exif()
            exif[0x0112] = 6
            picture.save(path)
            body = exif.tobytes().removeprefix(b"Exif\0\0")
            chunk = b"eXIf" + body
            data, end = path.read_bytes()[:-12], path.read_bytes()[-12:]
            path.write_bytes(data + struct.pack(">I", len(body)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + end)
    one = wanted(stylizer)[0]
    for tile in (None, 64):
        (made,) = make(stylizer, tmp_path / str(tile), path, [one], tile=tile)
        assert (made.state, (made.width, made.height)) == ("done", wanted_size), made.reason
    assert np.abs(pixels(tmp_path / "None", one) - pixels(tmp_path / "64", one)).max() <= 1
    with Image.open(io.BytesIO(file_thumbnail(path, side=96))) as shown:
        upright = picture.transpose(Image.Transpose.ROTATE_270) if kind == "late exif" else picture
        assert shown.size == wanted_size
        levels = [np.asarray(image.convert("L")).astype(int) for image in (shown, upright)]
        assert np.abs(levels[0] - levels[1]).mean() < 4


@pytest.mark.parametrize(("kind", "side"), [("webp", 16_400), ("jpeg", 65_600)])
@pytest.mark.parametrize("tile", [None, 64])
def test_a_picture_too_large_for_its_format_is_a_named_failure(stylizer, tmp_path, kind, side, tile):
    Image.new("RGB", (side, 16)).save(tmp_path / "c.png")
    (made,) = make(stylizer, tmp_path / "out", tmp_path / "c.png", wanted(stylizer, format=kind), tile=tile)
    assert made.state == "failed"
    assert re.match(rf"too_large_for_format: {side}x16 exceeds the \d+ px a side of {kind}; take png", made.reason)


def test_what_cannot_be_shown_has_no_thumbnail(tmp_path):
    (tmp_path / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert file_thumbnail(tmp_path / "c.png", side=50) == b""


def test_whatever_a_decoder_raises_is_of_the_picture(tmp_path, monkeypatch):
    smooth(96, 80).save(tmp_path / "c.png")
    for error, wanted in ((KeyError("x"), ImageError), (MemoryError(), MemoryError)):
        monkeypatch.setattr(inputs, "as_seen", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        with pytest.raises(wanted):
            decode_picture(tmp_path / "c.png", max_pixels=10**6)


def test_broken_files_are_refused_by_both_ways(tmp_path):
    smooth(160, 96).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match="truncated"):
        decode_picture(tmp_path / "cut.png", max_pixels=10**6)
    with pytest.raises(ImageError, match="truncated"):
        large.unpack(tmp_path / "cut.png", tmp_path / "raw")
    assert (held_open(tmp_path), (tmp_path / "raw").exists()) == ([], False)
    with pytest.raises(ImageError, match="too_many_pixels"):
        decode_picture(tmp_path / "a.png", max_pixels=100)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_srgb_or_kept_with_their_profile(stylizer, tmp_path, mode):
    """Without metadata a picture of another profile is converted; with it, pixels and profile stay what they were."""
    profile = swapped_profile()
    picture = smooth(96, 80).convert(mode)
    picture.save(tmp_path / "c.png", icc_profile=profile)
    stored = np.asarray(picture.convert("RGB")).astype(int)
    assert np.array_equal(decode_picture(tmp_path / "c.png", max_pixels=10**6, keep_colours=True), stored)
    assert np.abs(np.asarray(decode_picture(tmp_path / "c.png", max_pixels=10**6)) - stored).mean() > 2
    plain, kept = wanted(stylizer)[0], wanted(stylizer, keep_metadata=True)[0]
    for tile in (None, 64):
        root = tmp_path / str(tile)
        make(stylizer, root, tmp_path / "c.png", [plain, kept], tile=tile)
        with Image.open(root / kept.recipe.name) as image:
            assert image.info["icc_profile"] == profile
        with Image.open(root / plain.recipe.name) as image:
            assert "icc_profile" not in image.info
        assert np.abs(pixels(root, plain) - pixels(root, kept)).mean() > 2
    for one in (plain, kept):
        assert np.abs(pixels(tmp_path / "None", one) - pixels(tmp_path / "64", one)).max() <= 1


@pytest.mark.parametrize("tile", [None, 64])
def test_metadata_that_is_kept_says_nothing_wrong_of_the_size(stylizer, tmp_path, tile):
    """Of a turned photograph, whose EXIF has the width and height of what was stored."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    exif.get_ifd(0x8769).update({0x9003: "2020:01:01 00:00:00", 0xA002: 96, 0xA003: 80})
    smooth(96, 80).save(tmp_path / "c.jpg", exif=exif)
    (one,) = wanted(stylizer, keep_metadata=True)
    make(stylizer, tmp_path, tmp_path / "c.jpg", [one], tile=tile)
    with Image.open(tmp_path / one.recipe.name) as image:
        kept = image.getexif()
        inner = kept.get_ifd(0x8769)
    assert (image.size, kept[0x010F], inner[0x9003]) == ((80, 96), "Maker", "2020:01:01 00:00:00")
    assert (inner.get(0xA002, 80), inner.get(0xA003, 96)) == (80, 96)


def test_what_killed_workers_is_made_in_small_tiles(stylizer, tmp_path):
    smooth(96, 80).save(tmp_path / "c.png")
    for deaths, tile in ((2, None), (3, 256)):
        root = str(tmp_path / str(deaths))
        left = []
        begin = lambda count, deaths=deaths: left.append(count) or deaths  # noqa: E731, B023
        (made,) = Production(lambda: stylizer, root, Limits()).make(tmp_path / "c.png", wanted(stylizer), begin=begin)
        assert (made.state, made.tile, left) == ("done", tile, [1])


def test_a_grid_encodes_each_content_and_style_once_and_equals_pair_by_pair(stylizer, tmp_path, monkeypatch):
    contents = [smooth(48, 64, seed) for seed in range(3)]
    styles = [smooth(64, 64, seed + 10) for seed in range(4)]
    calls = {"encode_content": 0, "encode_style": 0}
    network = stylizer._network

    def counted(name):
        function = getattr(network, name)

        def call(image):
            calls[name] += 1
            return function(image)

        return call

    for name in calls:
        monkeypatch.setattr(network, name, counted(name))
    packs = [stylizer.style_pack(style, side=32) for style in styles]
    floats = [torch.from_numpy(np.array(one)).permute(2, 0, 1).float() / 255 for one in contents]
    grid = [list(stylizer.stylize_all(content, packs)) for content in floats]
    assert calls == {"encode_content": 3, "encode_style": 4}
    for content, row in zip(floats, grid, strict=True):
        for style, found in zip(styles, row, strict=True):
            small = torch.from_numpy(np.array(style.resize((32, 32), Image.Resampling.LANCZOS))).permute(2, 0, 1)
            with torch.inference_mode():
                alone = network(content[None], small[None].float() / 255)[0].clamp(0, 1)
            assert (found - alone).abs().max() <= 1e-5
    for number, content in enumerate(contents):
        content.save(tmp_path / f"{number}.png")
        outputs = [
            Wanted(n, Recipe("c", str(number), "s", "", pack.digest, "m", "", Options().__dict__), lambda p=pack: p)
            for n, pack in enumerate(packs)
        ]
        assert {one.state for one in make(stylizer, tmp_path / "out", tmp_path / f"{number}.png", outputs)} == {"done"}
    assert calls["encode_content"] == 3 + 12 + 3  # and 12 that this test did pair by pair
