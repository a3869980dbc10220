"""One model, pictures in and pictures out; packs that only their own model accepts."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from adaconv import checkpoint
from adaconv.errors import UsageError
from adaconv.images import to_tensor, to_uint8
from adaconv.stylize.pictures import shrink
from adaconv.stylize.style_pack import StylePack
from adaconv.stylize.stylizer import Stylizer
from tests.helpers import save_checkpoint


@pytest.fixture(scope="module")
def stylizer(tmp_path_factory):
    return Stylizer.from_folder(save_checkpoint(tmp_path_factory.mktemp("model"))[1])


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


@pytest.mark.parametrize("data", [b"", b"nonsense" * 9, save({"x": torch.ones(1)})])
def test_other_files_are_no_packs(data):
    with pytest.raises(UsageError, match="x is not a style pack"):
        StylePack.from_bytes(data, name="x", model_digest="")


def test_pictures_are_shrunk_and_never_enlarged():
    assert shrink(picture(200, 100), 50).size == (100, 50)
    assert shrink(picture(40, 30), 50).size == (40, 30)
    assert shrink(picture(40, 30), None).size == (40, 30)
