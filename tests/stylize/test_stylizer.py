"""One model, pictures in and pictures out; packs that only their own model accepts."""

import io
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from adaconv import checkpoint
from adaconv.errors import UsageError
from adaconv.images import to_tensor, to_uint8
from adaconv.model.adaptive_conv import adaptive_conv_reference
from adaconv.model.encoder_weights import load_encoder
from adaconv.model.kernels import AdaConvKernels
from adaconv.model.network import build_network
from adaconv.stylize.blend import kernels_of, mix, sum_of
from adaconv.stylize.inputs import decode_picture
from adaconv.stylize.pictures import shrink
from adaconv.stylize.style_pack import StylePack, mix_packs
from adaconv.stylize.stylizer import Stylizer
from tests.helpers import TINY_WIDTHS, save_checkpoint, swapped_profile
from tests.servers import REPO


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_picture_keeps_its_size(stylizer):
    pack = stylizer.style_pack(picture(40, 30), side=32)
    for width, height in ((64, 48), (51, 33), (16, 90)):
        assert stylizer.stylize(picture(width, height), pack).size == (width, height)


def test_the_result_is_the_networks(stylizer, tmp_path):
    network, _ = checkpoint.load_network(save_checkpoint(tmp_path)[1])
    content, style = picture(48, 40), picture(32, 32, seed=1)
    with torch.inference_mode():
        wanted = to_uint8(network(to_tensor(content)[None], to_tensor(style)[None])[0])
    found = np.asarray(stylizer.stylize(content, stylizer.style_pack(style, side=32)))
    assert np.abs(found.astype(int) - wanted).max() <= 1


def test_bfloat16_changes_a_picture_by_few_levels(stylizer, tmp_path):
    coarse = Stylizer.from_folder(save_checkpoint(tmp_path)[1], precision="bfloat16")
    content, style = picture(12, 10).resize((96, 80)), picture(8, 8, seed=1).resize((64, 64))
    wanted, found = (np.asarray(s.stylize(content, s.style_pack(style))).astype(int) for s in (stylizer, coarse))
    assert wanted.std() > 10
    assert 0 < np.abs(found - wanted).mean() < 4


def test_a_content_is_encoded_once_for_all_packs(stylizer, monkeypatch):
    calls = []
    encode = stylizer._network.encode_content
    monkeypatch.setattr(stylizer._network, "encode_content", lambda x: calls.append(1) or encode(x))
    packs = [stylizer.style_pack(picture(32, 32, seed)) for seed in range(3)]
    together = list(stylizer.stylize_all(picture(40, 40), packs))
    assert len(calls) == 1
    for pack, image in zip(packs, together, strict=True):
        assert stylizer.stylize(picture(40, 40), pack).tobytes() == image.tobytes()


def test_what_nothing_can_be_made_of_is_refused(stylizer):
    picture = np.zeros((40, 40, 3), np.uint8)
    for side in (0, -5):
        with pytest.raises(UsageError, match=f"side: expected 1 pixel or more, found {side}"):
            stylizer.style_pack(picture, side=side)
    pack = stylizer.style_pack(picture, side=32)
    with pytest.raises(UsageError, match="batch_size: expected 1 or more, found 0"):
        list(stylizer.stylize_all(picture, [pack], batch_size=0))
    with pytest.raises(UsageError, match="batch_size: expected 1 or more, found 0"):
        stylizer.stylize_many([picture], [pack], batch_size=0)


def test_a_pack_survives_its_file(stylizer):
    pack = stylizer.style_pack(picture(32, 32), side=24, source="monet.jpg")
    again = StylePack.from_bytes(pack.to_bytes(), name="monet", model_digest=stylizer.info.digest)
    assert again.digest == pack.digest
    assert (again.source, dict(again.options)) == ("monet.jpg", {"side": 24})
    assert all(torch.equal(again.code[name], pack.code[name]) for name in pack.code)
    assert pack.to_bytes() == again.to_bytes()


def test_how_a_style_is_read_is_part_of_its_digest(stylizer):
    style = picture(64, 64)
    digests = {stylizer.style_pack(style, side=side, source=name).digest for side in (24, 32) for name in ("a", "b")}
    assert len(digests) == 2  # the side counts, the name does not


def test_a_pack_of_another_model_is_refused_by_name(stylizer, tmp_path):
    other = Stylizer.from_folder(save_checkpoint(tmp_path, step=8)[1])
    pack = other.style_pack(picture(32, 32), source="monet.jpg")
    with pytest.raises(UsageError, match=r"monet\.jpg was made by model"):
        stylizer.stylize(picture(32, 32), pack)
    with pytest.raises(UsageError, match=r"monet-pack was made by model .* make the pack again"):
        StylePack.from_bytes(pack.to_bytes(), name="monet-pack", model_digest=stylizer.info.digest)


def test_a_pack_whose_bytes_changed_is_refused(stylizer):
    data = stylizer.style_pack(picture(32, 32)).to_bytes()
    code = data[8 + int.from_bytes(data[:8], "little") :]
    for place in range(len(data) - len(code), len(data), max(1, len(code) // 50)):
        changed = bytearray(data)
        changed[place] ^= 1
        with pytest.raises(UsageError, match="not those that were written"):
            StylePack.from_bytes(bytes(changed), name="monet", model_digest=stylizer.info.digest)


@pytest.mark.parametrize("data", [b"", b"nonsense" * 9, save({"x": torch.ones(1)})])
def test_other_files_are_no_packs(data):
    with pytest.raises(UsageError, match="x is not a style pack"):
        StylePack.from_bytes(data, name="x", model_digest="")


def test_a_strip_is_read_by_its_middle(stylizer, monkeypatch):
    """As a style, and as a content whose own style is faded in: at its whole length it would take all memory."""
    strip, ends = picture(1500, 2), picture(1500, 2)
    for left, right in ((0, 738), (762, 1500)):
        ends.paste("red", (left, 0, right, 2))
    sizes, encode = [], stylizer._network.encode_style
    monkeypatch.setattr(stylizer._network, "encode_style", lambda x: sizes.append(tuple(x.shape[-2:])) or encode(x))
    packs = [stylizer.style_pack(one, side=32) for one in (strip, ends, strip.transpose(Image.Transpose.ROTATE_90))]
    assert all(torch.equal(packs[0].code[name], packs[1].code[name]) for name in packs[0].code)
    stylizer.stylize(strip, packs[0], alpha=0.5, tile=64)
    assert sizes == [(32, 256), (32, 256), (256, 32), (32, 256)]


def test_a_style_is_not_read_at_a_side_that_memory_has_no_room_for(tmp_path):
    small = Stylizer.from_folder(save_checkpoint(tmp_path)[1], max_memory_gb=0.5)
    with pytest.raises(UsageError, match=r"style_side: expected styles that max_memory_gb, 0\.5, .*, found 1000 px"):
        small.style_pack(picture(32, 32), side=1000)
    with pytest.raises(MemoryError, match=r"400x50 would be read at 4800x600, beyond 0\.5 GB"):
        small.style_pack(picture(400, 50), side=600)
    assert small.style_pack(picture(32, 32), side=600).side == 600


def test_pictures_are_shrunk_and_never_enlarged():
    assert shrink(picture(200, 100), 50).size == (100, 50)
    assert shrink(picture(40, 30), 50).size == (40, 30)
    assert shrink(picture(40, 30), None).size == (40, 30)


def smooth(width, height, seed=0):
    """A picture with areas, as photographs have."""
    return picture(max(2, width // 16), max(2, height // 16), seed).resize((width, height), Image.Resampling.BICUBIC)


def floats(image):
    return to_tensor(image)


def apart(a, b):
    return float((a - b).square().mean().sqrt())


def test_pictures_come_back_as_what_they_were(stylizer):
    pack = stylizer.style_pack(picture(32, 32), side=32)
    content = picture(40, 24)
    wanted = np.asarray(stylizer.stylize(content, pack))
    pixels = np.asarray(content)
    assert np.array_equal(stylizer.stylize(pixels, pack), wanted)
    for dtype in (np.float32, np.float64):
        found = stylizer.stylize((pixels / 255).astype(dtype), pack)
        assert found.dtype == dtype
        assert np.abs(found * 255 - wanted).max() <= 0.51
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    for given in (tensor, tensor.float() / 255, (tensor.float() / 255)[None]):
        found = stylizer.stylize(given, pack)
        assert (found.shape, found.dtype) == (given.shape, given.dtype)
        levels = found.float() * (1 if given.dtype == torch.uint8 else 255)
        assert (levels.reshape(3, 24, 40) - torch.from_numpy(wanted.copy()).permute(2, 0, 1)).abs().max() <= 0.51
    for mode in ("L", "RGBA", "P", "CMYK", "1", "I;16"):
        assert stylizer.stylize(content.convert("L" if mode == "I;16" else mode), pack).size == (40, 24)
    for wrong in (np.zeros((24, 40)), torch.zeros(4, 24, 40), torch.zeros(2, 3, 8, 8), np.zeros((8, 8, 3), np.int32)):
        with pytest.raises(UsageError, match="expected a PIL picture"):
            stylizer.stylize(wrong, pack)


@pytest.mark.parametrize(
    ("scale", "shift", "found"), [(255, 0, "found 0 to 25"), (2, -1, "found -1 to "), (1, np.nan, "found nan to nan")]
)
def test_floats_of_another_scale_are_refused(stylizer, scale, shift, found):
    """They would be a picture all the same: a plausible wrong one."""
    levels = np.linspace(0, 1, 24 * 40 * 3, dtype=np.float32).reshape(24, 40, 3)
    pack = stylizer.style_pack(levels, side=32)
    wrong = (levels * scale + shift).astype(np.float32)
    for call in (
        lambda: stylizer.stylize(wrong, pack),
        lambda: stylizer.style_pack(torch.from_numpy(wrong).permute(2, 0, 1), side=32),
        lambda: stylizer.stylize(levels, pack, mask=wrong[..., 0]),
    ):
        with pytest.raises(UsageError, match=found):
            call()
    beyond = levels * 1.2 - 0.1  # as a cubic filter leaves it
    assert np.isfinite(stylizer.stylize(beyond, pack)).all()


def test_what_is_no_picture_is_told_so(stylizer):
    for wrong in ("painting.jpg", Image.new("RGB", (0, 5)), None):
        with pytest.raises(UsageError, match="expected a PIL picture"):
            stylizer.style_pack(wrong)
        with pytest.raises(UsageError, match="expected a PIL picture"):
            stylizer.stylize(wrong, stylizer.style_pack(picture(32, 32)))
    with pytest.raises(UsageError, match="make a pack of each, then mix_packs"):
        stylizer.style_pack([picture(32, 32), picture(32, 32, 1)], source_sha256="ab")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_of_a_mask_is_outside(stylizer, mode):
    content, pack = picture(64, 48), stylizer.style_pack(picture(32, 32, 1), side=32)
    region = np.zeros((48, 64), np.uint8)
    region[:, 20:50] = 255
    mask = Image.merge("RGBA", [Image.new("L", (64, 48), 255)] * 3 + [Image.fromarray(region)]).convert(mode)
    wanted = stylizer.stylize(content, pack, mask=region)
    assert stylizer.stylize(content, pack, mask=mask).tobytes() == wanted.tobytes()
    assert stylizer.stylize(content, pack).tobytes() != wanted.tobytes()


def test_pil_pictures_are_taken_as_they_are_seen(stylizer, tmp_path):
    """Upright and in sRGB, as a job takes the same file; the result needs no tag for it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth(96, 64).save(tmp_path / "c.png", exif=exif, icc_profile=swapped_profile())
    seen = decode_picture(tmp_path / "c.png", max_pixels=10**6)
    assert seen.size == (64, 96)
    style = smooth(64, 64, 1)
    with Image.open(tmp_path / "c.png") as opened:
        found = stylizer.stylize(opened, stylizer.style_pack(style, side=32))
        pack = stylizer.style_pack(opened, side=32)
        assert opened.size == (96, 64)  # the caller's own stays what it is
    assert (found.size, found.mode, found.info) == ((64, 96), "RGB", {})
    assert found.tobytes() == stylizer.stylize(seen, stylizer.style_pack(style, side=32)).tobytes()
    assert pack.digest == stylizer.style_pack(seen, side=32).digest
    lying, standing = smooth(96, 64, 2).convert("L"), smooth(96, 64, 2).convert("L").rotate(-90, expand=True)
    lying.save(tmp_path / "m.png", exif=exif)
    with Image.open(tmp_path / "m.png") as mask:
        masked = [stylizer.stylize(seen, pack, mask=one) for one in (mask, standing)]
    assert masked[0].tobytes() == masked[1].tobytes()
    turned = np.asarray(seen)
    assert pack.digest == stylizer.style_pack(Image.fromarray(turned), side=32).digest


def test_many_pairs_are_batched_by_size(stylizer, monkeypatch):
    contents = [picture(40, 24), picture(32, 32), picture(40, 24, 3), picture(40, 24, 4)]
    packs = [stylizer.style_pack(picture(32, 32, seed), side=32) for seed in range(4)]
    sizes = []
    encode = stylizer._network.encode_content
    monkeypatch.setattr(stylizer._network, "encode_content", lambda x: sizes.append(tuple(x.shape)) or encode(x))
    together = stylizer.stylize_many(contents, packs, batch_size=2)
    assert sizes == [(2, 3, 24, 40), (1, 3, 24, 40), (1, 3, 32, 32)]
    for content, pack, found in zip(contents, packs, together, strict=True):
        assert np.abs(np.asarray(found).astype(int) - np.asarray(stylizer.stylize(content, pack))).max() <= 1


def test_alpha_fades_from_the_contents_own_style(stylizer):
    """Distances from the reconstruction grow with alpha; alpha 0 is the content with itself as style."""
    for seed in range(4):
        content, style = smooth(96, 80, seed), smooth(64, 64, seed + 10)
        pack = stylizer.style_pack(style, side=32)
        faded = [stylizer.stylize(floats(content), pack, alpha=alpha) for alpha in (0, 0.25, 0.5, 0.75, 1)]
        distances = [apart(one, faded[0]) for one in faded]
        assert distances == sorted(distances)
        assert distances[1] > 0
        assert torch.equal(faded[-1], stylizer.stylize(floats(content), pack))
        own = stylizer.stylize(floats(content), stylizer.style_pack(content, side=32))
        assert apart(faded[0], own) < 0.1 * distances[-1]
    with pytest.raises(UsageError, match="alpha: expected 0"):
        stylizer.stylize(content, pack, alpha=1.5)


@pytest.fixture(scope="module")
def adain():
    torch.manual_seed(0)
    encoder = load_encoder("seeded:0", widths=TINY_WIDTHS)
    network = build_network(encoder=encoder, architecture="adain")
    return Stylizer(network, checkpoint.ModelInfo("0" * 64, {}, "", 0))


def test_adain_fades_as_published_and_masks_and_tiles_too(adain):
    content, style = floats(smooth(96, 80)), floats(smooth(64, 64, 5))
    pack = adain.style_pack(style, side=64)
    network = adain._network
    with torch.inference_mode():
        features = network.encode_content(content[None])
        stylized = network.transfer.predict(network.encoder.relu4_1(style[None]))
        normal = torch.nn.functional.instance_norm(features, eps=1e-5)
        there = normal * stylized["std"][..., None, None] + stylized["mean"][..., None, None]
        x = 0.3 * there + 0.7 * features
        for scale in network.transfer.scales:
            x = scale(x)
    for tile in (None, 64):
        assert (adain.stylize(content, pack, alpha=0.3, tile=tile) - x[0].clamp(0, 1)).abs().max() < 2e-3
    assert adain.stylize(content, pack, mask=torch.ones(80, 96)).shape == content.shape


def test_a_mixture_is_even_and_linear(stylizer):
    content = floats(smooth(64, 64))
    a, b = (stylizer.style_pack(smooth(64, 64, seed), side=32) for seed in (1, 2))
    only_a = stylizer.stylize(content, a)
    assert torch.allclose(stylizer.stylize(content, [a, a]), only_a, atol=1e-5)
    assert torch.equal(stylizer.stylize(content, [a, b], weights=[3, 0]), only_a)
    assert torch.equal(stylizer.stylize(content, [a, b]), stylizer.stylize(content, [b, a], weights=[2, 2]))
    towards = [apart(stylizer.stylize(content, [a, b], weights=[1 - w, w]), only_a) for w in (0.2, 0.5, 0.8, 1)]
    assert towards == sorted(towards)
    mixed = mix_packs([a, b], [1, 3])
    again = StylePack.from_bytes(mixed.to_bytes(), name="m", model_digest=stylizer.info.digest)
    assert torch.equal(stylizer.stylize(content, again), stylizer.stylize(content, [a, b], weights=[1, 3]))
    assert again.digest != mix_packs([a, b], [3, 1]).digest
    assert again.source_sha256 == "+".join(sorted((a.source_sha256, b.source_sha256)))
    assert mix_packs([a, b], [1, 0]).source_sha256 == a.source_sha256  # b is no part of it
    nested = mix_packs([mixed, a])
    assert nested.side == mixed.side == 32
    assert torch.allclose(
        stylizer.stylize(content, nested, alpha=0.5),
        stylizer.stylize(content, [a, b], weights=[5, 3], alpha=0.5),
        atol=1e-5,
    )
    for weights in ([1], [1, -1], [0, 0], [math.inf, 1], [math.nan, 1]):
        with pytest.raises(UsageError, match="expected 2 weights"):
            stylizer.stylize(content, [a, b], weights=weights)


def test_a_mixed_block_does_the_mean_of_what_blocks_do():
    """Independent of the network: kernels composed and mixed, against the mean of two blocks' outputs."""
    torch.manual_seed(0)
    groups, channels, per_group = 2, 6, 3
    x = torch.randn(1, channels, 9, 9)
    kernels = [
        AdaConvKernels(
            torch.randn(1, channels, per_group, 3, 3),
            torch.randn(1, channels, per_group, 1, 1),
            torch.randn(1, channels),
        )
        for _ in range(2)
    ]
    codes = [{f"kernels.0.{name}": tensor for name, tensor in one._asdict().items()} for one in kernels]
    before = [dict(code) for code in codes]
    (mixed,) = kernels_of(mix(codes, [1, 3]))
    assert all(code[name] is tensor for code, was in zip(codes, before, strict=True) for name, tensor in was.items())
    outs = [adaptive_conv_reference(x, one, groups=groups) for one in kernels]
    found = adaptive_conv_reference(x, mixed, groups=groups)
    assert torch.allclose(found, 0.25 * outs[0] + 0.75 * outs[1], atol=1e-4)
    assert mix(codes, [2, 0]) is codes[0]  # and nothing is composed for it
    tensor = kernels[0].depthwise
    assert torch.equal(sum_of([(tensor, share) for share in (0.1, 0.2, 0.7)]), tensor)


def test_under_a_mask_each_style_is_as_if_alone(stylizer):
    """Away from the border; at it, blocks blend."""
    content = floats(smooth(320, 64))
    packs = [stylizer.style_pack(smooth(64, 64, seed), side=32) for seed in (1, 2)]
    left = torch.zeros(64, 320)
    left[:, :160] = 1
    blended = stylizer.stylize(content, packs, mask=[left, 1 - left])
    alone = [stylizer.stylize(content, pack) for pack in packs]
    reach = 64  # of the decoder's convolutions, in pixels
    assert (blended - alone[0])[..., : 160 - reach].abs().max() < 1e-5
    assert (blended - alone[1])[..., 160 + reach :].abs().max() < 1e-5
    assert apart(alone[0], alone[1]) > 0.01
    own = stylizer.stylize(content, packs[0], alpha=0)
    single = stylizer.stylize(content, packs[0], mask=Image.fromarray((left.numpy() * 255).astype(np.uint8)))
    assert (single - alone[0])[..., : 160 - reach].abs().max() < 1e-5
    assert (single - own)[..., 160 + reach :].abs().max() < 1e-5
    with pytest.raises(UsageError, match="expected masks of the content's 320x64"):
        stylizer.stylize(content, packs, mask=[left.T, left.T])
    with pytest.raises(UsageError, match="expected a mask for each of 2 packs"):
        stylizer.stylize(content, packs, mask=left)


@pytest.mark.parametrize("mode", ["L", "I;16", "I", "F"])
def test_masks_of_any_depth_apply_as_far_as_they_are_white(stylizer, mode):
    content, pack = picture(64, 48), stylizer.style_pack(picture(32, 32, 1), side=32)
    levels = np.linspace(0, 255, 64).round().astype(np.uint8)[None].repeat(48, 0)
    dtype, whitest = {"L": (np.uint8, 1), "I;16": (np.uint16, 257), "I": (np.int32, 257), "F": (np.float32, 1 / 255)}[
        mode
    ]
    mask = Image.fromarray((levels * np.float64(whitest)).astype(dtype))
    assert mask.mode == mode
    wanted = stylizer.stylize(content, pack, mask=levels)
    assert stylizer.stylize(content, pack, mask=mask).tobytes() == wanted.tobytes()
    if mode in ("I;16", "I"):
        with pytest.raises(UsageError, match="expected a mask of uint8, or floating in"):
            stylizer.stylize(content, pack, mask=np.asarray(mask))


def test_colours_of_the_content_are_kept(stylizer):
    content = floats(smooth(96, 80, 3)) * 0.5 + 0.2
    pack = stylizer.style_pack(smooth(64, 64, 4), side=32)
    plain, luminance, coral = (stylizer.stylize(content, pack, color=c) for c in ("style", "luminance", "coral"))
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    luma = (plain * weights).sum(0)
    expected = content - (content * weights).sum(0) + luma
    inside = ((expected > 0) & (expected < 1)).all(0)
    assert inside.float().mean() > 0.2
    assert torch.allclose(luminance[:, inside], expected[:, inside], atol=1e-5)
    assert torch.allclose(coral.mean((1, 2)), content.mean((1, 2)), atol=0.03)
    wanted, found, before = (torch.cov(x.flatten(1)) for x in (content, coral, plain))
    assert (found - wanted).norm() < 0.5 * (before - wanted).norm()


def test_a_pack_holds_a_thumbnail_and_may_be_of_several_pictures(stylizer):
    pack = stylizer.style_pack([smooth(64, 64, 1), np.asarray(smooth(50, 70, 2)), floats(smooth(64, 64, 3))], side=32)
    with Image.open(io.BytesIO(pack.thumbnail)) as image:
        assert image.size == (70, 70)  # side by side in a square of the largest
    assert pack.side == 32
    assert stylizer.stylize(picture(32, 32), pack).size == (32, 32)


def test_the_same_threads_give_the_same_bits_and_others_round(stylizer):
    content = picture(170, 150)
    pack = stylizer.style_pack(picture(64, 64, 1))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            found.append(np.asarray(stylizer.stylize(content, pack)).astype(int))
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(found[0], found[2])
    assert np.abs(found[0] - found[1]).max() <= 1


def test_a_model_is_found_by_its_folder_and_without_what_jobs_need(tmp_path):
    """In three lines, on a machine that has neither Ray nor MLflow."""
    _, folder = save_checkpoint(tmp_path)
    others = ("ray", "mlflow", "webdataset", "s3fs", "pydantic", "tyro", "simplejpeg")
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({others!r}))\n"  # importing any of them fails
        "from adaconv import Stylizer\nfrom PIL import Image\nimport bench.stylize_tiled, bench.stylize_large\n"
        f"stylizer = Stylizer.from_model({folder!r})\n"
        "print(stylizer.stylize(Image.new('RGB', (40, 30)), stylizer.style_pack(Image.new('RGB', (32, 32)))).size)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=REPO)
    assert done.stdout == "(40, 30)\n", done.stderr
