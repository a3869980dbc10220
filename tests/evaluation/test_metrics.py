"""What each metric sees, and what it leaves alone."""

import math

import pytest
import torch

from adaconv.evaluation.metrics import METRICS, OF_PAIRS, Judge, compare, identity
from adaconv.model.encoder_weights import load_encoder


@pytest.fixture(scope="module")
def judge():
    return Judge(load_encoder("seeded:0", widths=(8, 16, 16, 32)))


def picture(seed: int, side: int = 64):
    """Smooth coloured noise, (1, 3, side, side) in [0.2, 0.8]."""
    coarse = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(seed))
    return 0.2 + 0.6 * torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")


def test_a_copy_of_the_content_has_its_content_and_a_copy_of_the_style_its_style(judge):
    content, style = judge.look(picture(0)), judge.look(picture(1))
    kept, taken = compare(content, content, style), compare(style, content, style)
    assert set(kept) == set(OF_PAIRS)
    assert set(METRICS) == {*OF_PAIRS, "identity"}
    for name in ("content", "structure"):
        assert kept[name] == 0 < taken[name]
    for name in ("style", "gram", "colour"):
        assert taken[name] == 0 < kept[name]


def test_fine_patterns_have_all_their_colours(judge):
    """Stripes as wide as a pixel, of a picture of which not every pixel is looked at."""
    stripes = torch.zeros(1, 3, 64, 512)
    stripes[..., 1::2] = 1
    looks = [judge.look(picture) for picture in (stripes, stripes.roll(1, dims=-1), torch.zeros_like(stripes))]
    assert compare(looks[0], looks[1], looks[1])["colour"] < 0.05
    assert compare(looks[0], looks[2], looks[2])["colour"] == pytest.approx(0.34, abs=0.05)


def test_colour_is_how_far_colours_have_to_be_moved(judge):
    one = picture(0)
    shifts = [compare(judge.look(one + step), judge.look(one), judge.look(one))["colour"] for step in (0.05, 0.1)]
    assert shifts[1] == pytest.approx(2 * shifts[0], rel=1e-3)
    darker = compare(judge.look(one - 0.1), judge.look(one), judge.look(one))["colour"]
    assert darker == pytest.approx(shifts[1], rel=1e-3)
    # Where the pixels lie says nothing of their colours.
    turned = compare(judge.look(one.rot90(1, (2, 3))), judge.look(one), judge.look(one))
    assert turned["colour"] == pytest.approx(0, abs=1e-6)
    assert turned["structure"] > 0.1


def test_structure_survives_other_light_and_not_other_places(judge):
    one = picture(2)
    content = judge.look(one)
    relit = compare(judge.look(0.1 + 0.8 * one), content, content)["structure"]
    blocks = one.unfold(2, 16, 16).unfold(3, 16, 16).reshape(1, 3, 16, 16, 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = blocks[:, :, order].reshape(1, 3, 4, 4, 16, 16).permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 64, 64)
    moved = compare(judge.look(shuffled), content, content)["structure"]
    assert relit < 0.5 * moved
    assert moved <= 2


def test_gram_sees_what_means_and_deviations_do_not(judge):
    """Each channel keeps its values; which of them are high together changes."""
    one = picture(3)
    apart = torch.cat([one[:, :1], one[:, 1:2].flip(2), one[:, 2:].flip(3)], dim=1)
    before, after = judge.look(one), judge.look(apart)
    assert compare(after, before, before)["gram"] > 0.001
    assert compare(after, before, before)["colour"] > 0


def test_identity_is_a_root_mean_square():
    one = torch.zeros(1, 3, 8, 8)
    assert identity(one, one) == 0
    assert identity(one + 0.25, one) == pytest.approx(0.25)


def test_values_that_are_no_numbers_stay_so(judge):
    broken = picture(0)
    broken[0, 1, 3, 4] = math.nan
    content = judge.look(picture(0))
    found = compare(judge.look(broken), content, content)
    assert all(math.isnan(found[name]) for name in OF_PAIRS)
