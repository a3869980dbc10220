"""A model on a protocol: the same whatever was broken off, and what is wrong with it by itself."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from adaconv.checkpoint import load_network
from adaconv.config.evaluate import GateConfig
from adaconv.errors import UsageError
from adaconv.evaluation.job import _verdict
from adaconv.evaluation.metrics import METRICS, OF_PAIRS, Judge, compare
from adaconv.evaluation.protocol import read_protocol
from adaconv.evaluation.scores import Evaluation, _defects, table_of
from adaconv.model.encoder_weights import fingerprint, load_encoder
from adaconv.stylize.stylizer import Stylizer
from tests.helpers import save_checkpoint

SIZES = {"contents": 3, "styles": 4, "side": 64, "style_side": 64}


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("seeded:1", widths=(8, 16, 16, 32))


@pytest.fixture(scope="module")
def protocol(photos, paintings, encoder):
    return read_protocol([str(photos)], [str(paintings)], judge=fingerprint(encoder), **SIZES)


@pytest.fixture
def network(tmp_path):
    _, uri = save_checkpoint(tmp_path / "model")
    return load_network(uri)


def evaluation(protocol, encoder, folder):
    return Evaluation(protocol, Judge(encoder), device="cpu", output=str(folder))


def test_every_pair_is_measured(protocol, encoder, network, tmp_path):
    told = []
    scores = evaluation(protocol, encoder, tmp_path).scores("mine", Stylizer(*network), told.append)
    assert told == [4, 4, 4]
    assert scores.defects == ()
    assert {name: scores.of[name].shape for name in METRICS} == dict.fromkeys(OF_PAIRS, (3, 4)) | {"identity": (3, 1)}
    assert all(np.isfinite(scores.of[name]).all() and (scores.of[name] > 0).all() for name in METRICS)
    assert set(scores.shown) == {(c, s) for c in range(3) for s in range(4)}
    # Each pair has its own: measured alone, it gets the same.
    stylizer, judge = Stylizer(*network), Judge(encoder)
    content, style = protocol.contents[2].pixels[None] / 255, protocol.styles[1].pixels[None] / 255
    output = stylizer.stylize(content, stylizer.style_pack(style, side=64))
    alone = compare(judge.look(output), judge.look(content), judge.look(style))
    assert {name: scores.of[name][2, 1] for name in OF_PAIRS} == pytest.approx(alone, rel=1e-5)
    table = table_of([scores], protocol)
    assert table.num_rows == 12
    assert table["gram"].to_pylist() == scores.of["gram"].reshape(-1).tolist()


def test_doing_nothing_has_the_content_and_no_style(protocol, encoder, tmp_path):
    unchanged = evaluation(protocol, encoder, tmp_path).unchanged()
    for name in ("content", "structure", "identity"):
        assert (unchanged.of[name] == 0).all()
    for name in ("style", "gram", "colour"):
        assert (unchanged.of[name] > 0).all()


def test_what_was_measured_is_not_measured_again(protocol, encoder, network, tmp_path, monkeypatch):
    whole = evaluation(protocol, encoder, tmp_path).scores("mine", Stylizer(*network))
    folder = next((tmp_path / "scores").iterdir())
    (folder / "00001.json").unlink()
    made = []
    plain = Stylizer.stylize_all
    monkeypatch.setattr(Stylizer, "stylize_all", lambda *args, **how: made.append(1) or plain(*args, **how))
    again = evaluation(protocol, encoder, tmp_path).scores("mine", Stylizer(*network))
    assert len(made) == 1
    assert all((whole.of[name] == again.of[name]).all() for name in METRICS)
    assert whole.shown == again.shown
    # Another model's are its own.
    net, info = network
    evaluation(protocol, encoder, tmp_path).scores("other", Stylizer(net, replace(info, digest="f" * 64)))
    assert len(made) == 4


def test_pictures_beyond_the_memory_are_made_in_tiles(photos, paintings, encoder, network, tmp_path, monkeypatch):
    sizes = {"contents": 2, "styles": 2, "side": 512, "style_side": 64}
    protocol = read_protocol([str(photos)], [str(paintings)], judge=fingerprint(encoder), **sizes)
    whole = evaluation(protocol, encoder, tmp_path / "whole").scores("mine", Stylizer(*network))
    small = Stylizer(*network, max_memory_gb=0.46)
    assert small.tile_of(512, 512) is not None
    monkeypatch.setattr(Stylizer, "stylize_all", None)  # whole frames
    plain, sides = Stylizer.stylize, set()
    monkeypatch.setattr(Stylizer, "stylize", lambda *args, tile="auto": sides.add(tile) or plain(*args, tile=tile))
    tiled = evaluation(protocol, encoder, tmp_path / "tiled").scores("mine", small)
    for name in METRICS:
        assert tiled.of[name] == pytest.approx(whole.of[name], rel=1e-3)
    assert sides == {"auto", small.tile_of(512, 512), small.tile_of(512, 512) // 16 * 8}


def test_a_protocol_is_named_by_its_pictures_sizes_and_judge(photos, paintings, tmp_path):
    def protocol_of(photos=photos, judge="j", **other):
        return read_protocol([str(photos)], [str(paintings)], judge=judge, **{**SIZES, **other})

    first = protocol_of()
    assert protocol_of().id == first.id
    others = [
        protocol_of(**change).id for change in ({"side": 72}, {"style_side": 72}, {"contents": 2}, {"judge": "k"})
    ]
    assert len({first.id, *others}) == 5
    copied = tmp_path / "elsewhere"
    copied.mkdir()
    for file in photos.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    assert protocol_of(copied).id == first.id
    changed = copied / first.contents[0].source
    Image.open(changed).rotate(180).save(changed)
    assert protocol_of(copied).id != first.id


def test_pictures_are_the_middle_squares(photos, paintings):
    protocol = read_protocol([str(photos)], [str(paintings)], judge="j", **SIZES)
    one = protocol.contents[0]
    assert one.pixels.shape == (3, 64, 64)
    assert one.pixels.dtype == torch.uint8
    with Image.open(photos / one.source) as image:
        short = min(image.size)
        left, top = (image.width - short) // 2, (image.height - short) // 2
        middle = (
            image.convert("RGB").crop((left, top, left + short, top + short)).resize((64, 64), Image.Resampling.BOX)
        )
    assert np.abs(np.asarray(middle, np.float64) - one.pixels.permute(1, 2, 0).numpy()).mean() < 8


def test_broken_pictures_are_all_named(photos, paintings, tmp_path):
    for number, file in enumerate(sorted(photos.iterdir())[:4]):
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 400 if number % 2 else None])
    with pytest.raises(UsageError, match=r"2 pictures .*photo_00001.jpg.*photo_00003.jpg"):
        read_protocol([str(tmp_path)], [str(paintings)], judge="j", **{**SIZES, "contents": 4})


def test_a_picture_counts_once_and_one_is_too_few(photos, paintings, tmp_path):
    sizes = {**SIZES, "contents": 100}
    with pytest.raises(UsageError, match=r"photo_00000.jpg and .*photo_00000.jpg are the same picture"):
        read_protocol([str(photos), str(photos)], [str(paintings)], judge="j", **sizes)
    (tmp_path / "alone.jpg").write_bytes((photos / "photo_00000.jpg").read_bytes())
    with pytest.raises(UsageError, match=r"--content: expected two pictures or more, found alone.jpg"):
        read_protocol([str(tmp_path)], [str(paintings)], judge="j", **sizes)


def test_a_style_of_one_colour_is_one_of_many(protocol, encoder):
    """Its Gram matrices are nearly nothing: divided by them alone, its scores would be all there is."""
    look = Judge(encoder).look
    output, content = (look(one.pixels[None] / 255) for one in (protocol.styles[0], protocol.contents[0]))
    flat = look(torch.full((1, 3, 64, 64), 0.45))
    assert compare(output, content, flat)["gram"] <= 1


def test_a_model_that_changes_nothing_is_told(protocol, encoder, tmp_path):
    unchanged = evaluation(protocol, encoder, tmp_path).unchanged()
    verdict = _verdict(GateConfig(), [replace(unchanged, model="mine"), unchanged], None)
    assert not verdict.promoted
    assert verdict.reasons[0].startswith("no stylization")


def test_a_metric_that_is_no_number_is_a_defect():
    of = {name: np.zeros((3, 4 if name in OF_PAIRS else 1)) for name in METRICS}
    of |= {"finite": np.ones((3, 4)), "contrast": np.ones((3, 4)), "spread": np.ones((3, 1))}
    assert _defects(of, apart=0.0) == []
    of["identity"][1] = math.nan  # of a content in its own style, while all else is sound
    assert _defects(of, apart=0.0) == ["identity is no number"]


def broken(net, how):
    with torch.no_grad():
        last = [module for module in net.transfer.modules() if isinstance(module, torch.nn.Conv2d)][-1]
        if how == "grey":
            last.weight.zero_()
        if how == "no numbers":
            last.bias[1] = math.nan
        if how == "flat":  # the last bias alone, whatever the picture shows
            last.weight.zero_()
            last.bias.copy_(torch.tensor([0.9, 0.1, 0.1]))
        if how == "one style":
            for parameter in net.transfer.style_encoder.parameters():
                parameter.zero_()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("grey", "are grey"),
        ("flat", "are grey"),
        ("no numbers", "12 of 12"),
        ("one style", "do not depend on the style"),
    ],
)
def test_what_is_wrong_with_a_model_by_itself(protocol, encoder, network, tmp_path, how, said):
    net, info = network
    broken(net, how)
    scores = evaluation(protocol, encoder, tmp_path).scores("mine", Stylizer(net, info))
    assert any(said in defect for defect in scores.defects), scores.defects
    assert json.loads(next((tmp_path / "scores").rglob("*.json")).read_bytes())  # Python reads NaN again
