"""Colours taken from the content: what the formulas promise, without a network."""

import pytest
import torch

from adaconv.stylize.colour import ColorStatistics, coral, with_chroma_of


def colours(height, width, *, seed, spread=0.08, mean=0.5):
    """(1, 3, h, w) of correlated channels, well inside [0, 1]."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.rand(3, 3, generator=draw) - 0.3
    values = torch.einsum("ij,jhw->ihw", mixing, torch.randn(3, height, width, generator=draw).clamp(-2, 2))
    return (mean + spread * values)[None]


def statistics(*windows):
    found = ColorStatistics()
    for window in windows:
        found.add(window)
    return found


def covariance(picture):
    return torch.cov(picture[0].double().flatten(1), correction=0)


def test_statistics_are_the_whole_picture_s_however_it_is_cut():
    picture = colours(40, 60, seed=0)
    for found in (statistics(picture), statistics(*picture.split(7, dim=2)), statistics(*picture.split(25, dim=3))):
        assert torch.allclose(found.mean, picture[0].double().mean((1, 2)), rtol=1e-12)
        apart = found.covariance - covariance(picture)
        assert torch.allclose(apart, apart.diagonal().mean() * torch.eye(3).double(), atol=1e-12)
        assert 0 < apart.diagonal().mean() < 1e-4


def test_what_lies_outside_of_a_picture_s_range_is_counted_and_moved_as_its_edge():
    wild = colours(20, 30, seed=1, spread=0.8)
    clamped = wild.clamp(0, 1)
    assert not torch.equal(wild, clamped)
    assert torch.equal(statistics(wild).covariance, statistics(clamped).covariance)
    want = statistics(colours(20, 30, seed=2))
    found = [coral(one, have=statistics(clamped), want=want) for one in (wild, clamped)]
    assert torch.equal(*found)


def test_coral_gives_a_picture_the_wanted_mean_and_covariance():
    have, want = colours(50, 50, seed=3), colours(30, 70, seed=4, spread=0.12, mean=0.4)
    assert (covariance(have) - covariance(want)).abs().max() > 5e-3
    found = coral(have, have=statistics(have), want=statistics(want))
    assert torch.allclose(found.mean((0, 2, 3)), want.mean((0, 2, 3)), atol=1e-5)
    assert (covariance(found) - covariance(want)).abs().max() < 1e-3  # rounded by what keeps grey calm


def test_a_grey_picture_is_not_blown_up():
    grey = torch.full((1, 3, 8, 8), 0.5) + 1e-4 * colours(8, 8, seed=5)
    want = colours(8, 8, seed=6, spread=0.02, mean=0.3)
    found = coral(grey, have=statistics(grey), want=statistics(want))
    assert (found.mean((2, 3)) - want.mean((2, 3))).abs().max() < 1e-3
    assert found.std((2, 3)).max() < 0.1 * want.std((2, 3)).min()


@pytest.mark.parametrize("how", ["luminance", "coral"])
def test_colours_stay_in_their_range(how):
    content, stylized = torch.rand(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(7)).mul(3).sub(1)
    content = content.clamp(0, 1)
    if how == "luminance":
        found = with_chroma_of(content, stylized)
    else:
        found = coral(colours(16, 16, seed=8), have=statistics(colours(16, 16, seed=8)), want=statistics(content))
    assert (found.min(), found.max()) == (0, 1)


def test_a_chroma_under_its_own_luminance_is_the_picture_itself():
    picture = colours(16, 16, seed=9)
    assert torch.allclose(with_chroma_of(picture, picture), picture, atol=1e-6)
    grey = picture.mean(1, keepdim=True).expand_as(picture)
    assert torch.allclose(with_chroma_of(grey, picture).std(1), torch.zeros(1, 16, 16), atol=1e-6)
