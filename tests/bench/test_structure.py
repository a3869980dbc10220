"""That the measure of structure tells directions apart, and that its comparison runs."""

import json
import math

import pytest
import torch

from adaconv.data.synthetic import generate_paintings, generate_photos
from bench import structure


def stripes(angle):
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    wave = torch.sin(0.6 * (x * math.cos(angle) + y * math.sin(angle)))
    return (0.5 + 0.4 * wave).expand(1, 3, -1, -1)


def test_orientations_are_a_share_of_each_direction():
    for angle in (0.1, 0.7, 1.2, 2.9):
        share = structure.orientations(stripes(angle))
        assert share.sum().item() == pytest.approx(1)
        assert share.argmax().item() == int(angle / math.pi * 12)
        assert share.max() > 0.7
        assert (share - structure.orientations(1 - stripes(angle))).abs().max() < 1e-4
    assert structure.orientations(torch.full((1, 3, 16, 16), 0.5)).sum() == 0


class _Follower(torch.nn.Module):
    """Gives the style for the content."""

    def forward(self, content, style):
        return style


class _Blind(torch.nn.Module):
    def forward(self, content, style):
        return content


def test_outputs_that_turn_with_the_style_are_told_from_those_that_do_not():
    images = torch.cat([stripes(angle) for angle in (0.0, 0.4, 1.0, 2.0)]).mul(255).byte()
    assert structure.measure(_Follower(), images, images)["follow"] == pytest.approx(1, abs=1e-3)
    assert structure.measure(_Follower(), images, images)["change"] > 1
    assert structure.measure(_Blind(), images, images) == {"change": 0.0, "follow": 0.0}


def test_both_networks_are_trained_and_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(structure, "_HELD_OUT", 4)
    generate_photos(tmp_path / "photos", 10, seed=0, size=96)
    generate_paintings(tmp_path / "paintings", 10, seed=0, size=96)
    flags = ["--small", "--steps", "2", "--batch", "2", "--side", "48"]
    folders = ["--contents", str(tmp_path / "photos"), "--styles", str(tmp_path / "paintings")]
    assert structure.main([*folders, *flags]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["architecture"] for line in lines] == ["adaconv", "adain"]
    for line in lines:
        assert 0 < line["change"] < 2
        assert math.isfinite(line["follow"])
        assert line["style_loss"] > 0
