"""Tiles equal the whole frame: any size of picture and tile, both architectures, masks and colours too."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from adaconv.errors import UsageError
from adaconv.images import to_tensor
from adaconv.model.encoder_weights import load_encoder
from adaconv.model.network import build_network
from adaconv.stylize import large
from adaconv.stylize.layers import Moments, Region
from adaconv.stylize.outputs import Recipe
from adaconv.stylize.pictures import reduced
from adaconv.stylize.raster import FileRaster, MemoryRaster, Window, tiles
from adaconv.stylize.stylizer import Stylizer
from adaconv.stylize.tiling import Tiler, plan_tile
from tests.helpers import TINY_MODEL, TINY_WIDTHS, held_open, save_checkpoint
from tests.servers import REPO


def tiny(architecture="adaconv", **settings):
    torch.manual_seed(0)
    encoder = load_encoder("seeded:0", widths=TINY_WIDTHS)
    model = {**TINY_MODEL, **settings} if architecture == "adaconv" else {"architecture": architecture}
    return build_network(encoder=encoder, **model).to(memory_format=torch.channels_last).eval()


def in_tiles(network, picture, code, side, scratch=None):
    out = torch.full((1, 3, *picture.shape[-2:]), torch.nan)
    with torch.inference_mode():
        tiler = Tiler(network, side=side, scratch=scratch)
        tiler.stylize(MemoryRaster(picture), lambda moments: [Region(code)], MemoryRaster(out).write)
    return out


def smooth(height, width, seed=0):
    coarse = torch.rand(1, 3, height // 8 + 2, width // 8 + 2, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")


@pytest.mark.parametrize("settings", [{}, {"kernel_size": 5, "descriptor_size": 5}, {"output_activation": "sigmoid"}])
@pytest.mark.parametrize(("height", "width"), [(200, 136), (203, 131), (41, 300), (17, 16)])
def test_tiles_equal_the_whole_frame(settings, height, width, tmp_path):
    network = tiny(**settings)
    picture = smooth(height, width)
    with torch.inference_mode():
        code = network.encode_style(smooth(64, 64, seed=1))
        whole = network.stylize(picture, code)
    for side in (None, 64, 72, 128):
        assert (in_tiles(network, picture, code, side, tmp_path) - whole).abs().max() < 1e-4
    assert whole.std() > 0.01
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("height", "width", "side"), [(64, 64, 64), (180, 320, 64), (180, 320, 88), (256, 256, 64)])
def test_a_frame_of_one_colour_becomes_one_colour(level, height, width, side):
    """As when a film fades: what rounding leaves of a constant is not normalised to a picture of its own."""
    network, picture = tiny(), torch.full((1, 3, height, width), level)
    with torch.inference_mode():
        code = network.encode_style(smooth(64, 64, seed=1))
        whole = network.stylize(picture, code)
    tiled = in_tiles(network, picture, code, side)
    assert (tiled - whole).abs().max() < 1e-4
    assert max((one.amax(dim=(2, 3)) - one.amin(dim=(2, 3))).max() for one in (whole, tiled)) < 1e-4


def test_a_walk_that_ends_early_gives_back_the_disk(tmp_path):
    """Memory may run out at any tile, and the next attempt needs the room: an open file takes it, though removed."""
    network, picture = tiny(), smooth(200, 136)

    def write(window, values):
        assert len(held_open(tmp_path)) >= 2
        raise MemoryError

    with torch.inference_mode():
        code = network.encode_style(smooth(64, 64, seed=1))
        with pytest.raises(MemoryError):
            Tiler(network, side=64, scratch=tmp_path).stylize(MemoryRaster(picture), lambda m: [Region(code)], write)
    assert held_open(tmp_path) == []


def test_no_more_than_two_maps_lie_on_the_disk(tmp_path):
    network, picture, seen = tiny(), smooth(200, 136), set()

    def write(window, values):
        there = set(held_open(tmp_path))
        assert sum("map" in name for name in there) <= 2
        seen.update(there)

    with torch.inference_mode():
        code = network.encode_style(smooth(64, 64, seed=1))
        Tiler(network, side=64, scratch=tmp_path).stylize(MemoryRaster(picture), lambda m: [Region(code)], write)
    assert any("map" in name for name in seen)
    assert not any("features" in name for name in seen)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room is not taken beforehand")
def test_a_raster_that_finds_no_room_leaves_no_file(tmp_path):
    with pytest.raises(OSError, match=r"too large|No space"):
        FileRaster(tmp_path / "raster", 3, 2**31, 2**29, torch.uint8)
    assert (held_open(tmp_path), list(tmp_path.iterdir())) == ([], [])


def test_adain_in_tiles_equals_the_whole_frame():
    network = tiny("adain")
    picture = smooth(203, 131)
    with torch.inference_mode():
        code = network.encode_style(smooth(64, 64, seed=1))
        whole = network.stylize(picture, code)
    assert (in_tiles(network, picture, code, 64) - whole).abs().max() < 1e-4


def test_naive_tiles_do_not():
    """What is compared can differ: each tile by itself has other statistics, and seams."""
    network = tiny()
    picture = smooth(128, 128)
    with torch.inference_mode():
        code = network.encode_style(smooth(64, 64, seed=1))
        whole = network.stylize(picture, code)
        naive = torch.cat([network.stylize(half, code) for half in picture.split(64, dim=-1)], dim=-1)
    assert (naive - whole).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(1024, 1024), (1027, 1543), (2048, 1531)])
@pytest.mark.parametrize("side", [256, 576])
def test_the_papers_network_in_tiles_equals_the_whole_frame(height, width, side):
    torch.manual_seed(0)
    network = build_network(encoder=load_encoder("seeded:0")).to(memory_format=torch.channels_last).eval()
    torch.set_num_threads(2)
    picture = smooth(height, width) * 0.7 + torch.rand(1, 3, height, width) * 0.3
    with torch.inference_mode():
        code = network.encode_style(smooth(256, 256, seed=1))
        whole = network.stylize(picture, code)
    difference = (in_tiles(network, picture, code, side) - whole).abs().max()
    print(f"{height}x{width} in tiles of {side}: at most {difference:.2e} apart")
    assert difference < 1e-4


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 7), (700, 900), (2, 400_000)])
def test_a_raster_is_handed_to_libvips_as_it_is(height, width, tmp_path):
    """In one strip and in many, of rows longer than a strip too; Pillow reads the same file."""
    values = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
    raster = FileRaster(tmp_path / "raw", 3, height, width, torch.uint8)
    raster.write(Window(0, height, 0, width), values)
    recipe = Recipe("a.png", "0" * 64, "style", "1" * 64, "2" * 64, "model", "0" * 64, {"format": "png"})
    large.pack(raster, tmp_path / "packed.png", recipe)
    head, length = large._tiff_head(height, width)
    (tmp_path / "whole.tif").write_bytes(head + raster.read_bytes(0, length))
    assert (tmp_path / "whole.tif").stat().st_size == length
    for name in ("packed.png", "whole.tif"):
        with Image.open(tmp_path / name) as image:
            assert (to_tensor(image.convert("RGB")).mul(255).round().to(torch.uint8) == values[0]).all(), name


@pytest.mark.slow
def test_memory_does_not_grow_from_4_to_64_megapixels():
    """File to file, with an eighth of the paper's channels: what grows would be the picture, its maps, its files.

    All of the process's memory, pages of files included.
    """
    script = str(REPO / "bench" / "stylize_large.py")
    flags = ("--small", "--side", "2048", "--growth", "4", "--max-memory-gb", "0.6")
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    print(*found, sep="\n")
    assert [one["side"] for one in found] == [2048, 8192]
    assert found[0]["tile"] == found[1]["tile"]
    assert found[1]["peak_mb"] < 1.1 * found[0]["peak_mb"]
    assert found[1]["peak_mb"] < found[1]["limit_mb"]


@pytest.mark.parametrize("color", ["style", "luminance", "coral"])
@pytest.mark.parametrize("masked", [False, True])
def test_every_option_works_in_tiles(stylizer, color, masked):
    content = smooth(150, 131)[0]
    packs = [stylizer.style_pack(smooth(64, 64, seed=seed)[0], side=32) for seed in (1, 2)]
    mask = torch.linspace(0, 1, 131).expand(150, 131)
    how = {"alpha": 0.6, "color": color, "mask": [mask, (1 - mask) * 0.5] if masked else None}
    whole = stylizer.stylize(content, packs, tile=None, **how)
    assert (stylizer.stylize(content, packs, tile=64, **how) - whole).abs().max() < 1e-4


def test_bfloat16_maps_go_to_disk_and_back_as_they_are(stylizer, tmp_path):
    """Tiles differ from the whole frame no more than the whole frame from float32."""
    _, folder = save_checkpoint(tmp_path)
    coarse = Stylizer.from_folder(folder, precision="bfloat16")
    content = smooth(150, 131)[0]
    pack = stylizer.style_pack(smooth(64, 64, seed=1)[0], side=32)
    exact, whole = (one.stylize(content, pack, tile=None) for one in (stylizer, coarse))
    tiled = coarse.stylize(content, pack, tile=64)
    assert (tiled - whole).abs().mean() < 2 * (whole - exact).abs().mean()
    assert (tiled - exact).abs().mean() < 0.02


def test_moments_of_windows_are_those_of_the_whole():
    values = torch.rand(1, 4, 50, 70) * 3 + 100
    moments = Moments()
    for window in tiles(50, 70, 16):
        moments.add(MemoryRaster(values).read(window))
    exact = values.double()
    assert torch.allclose(moments.mean, exact.mean((0, 2, 3)), rtol=1e-7)
    assert torch.allclose(moments.squares / moments.count, exact.var((0, 2, 3), correction=0), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_file_holds_what_memory_would(tmp_path, dtype):
    values = (torch.rand(1, 5, 33, 47) * 200).to(dtype)
    raster = FileRaster(tmp_path / "x", 5, 33, 47, dtype)
    for window in tiles(33, 47, 16):
        raster.write(window, MemoryRaster(values).read(window))
    for window in (Window(0, 33, 0, 47), Window(3, 9, 40, 47), Window(32, 33, 0, 1)):
        assert torch.equal(raster.read(window), MemoryRaster(values).read(window))
    raster.close()
    assert not list(tmp_path.iterdir())


def test_the_plan_follows_from_size_and_limit():
    network = tiny()
    assert plan_tile(512, 512, network=network, max_memory_gb=4) is None
    sides = [plan_tile(60_000, 60_000, network=network, max_memory_gb=gb) for gb in (0.6, 1, 2)]
    assert all(side % 64 == 0 for side in sides)
    assert sides == sorted(set(sides))
    assert plan_tile(60_000, 90_000, network=network, max_memory_gb=1) == sides[1]
    with pytest.raises(UsageError, match=r"max_memory_gb: expected at least 0\.4"):
        plan_tile(60_000, 60_000, network=network, max_memory_gb=0.4)


def test_a_reduced_picture_is_near_pillows():
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((1100, 830), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    found = reduced(MemoryRaster(pixels), 96)[0].permute(1, 2, 0).numpy() * 255
    wanted = np.asarray(picture.resize((127, 96), Image.Resampling.LANCZOS))
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).mean() < 4
