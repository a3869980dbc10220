import pytest
import torch

from adaconv.training.losses import EPS, style_transfer_losses


def features(seed, count=2):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 16), (6, 8), (8, 4), (8, 2)]
    return [torch.rand(count, c, s, s, generator=generator, dtype=torch.float64) for c, s in shapes]


def losses(output, content, style, **options):
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    return style_transfer_losses(
        image, output, content, style, **{"content_weight": 2.0, "style_weight": 3.0, **options}
    )


def test_losses_are_what_the_formulas_say():
    """Compared with a loop over images and channels."""
    output, style, content = features(0), features(1), features(2)[-1]
    wanted_content = sum((o - c).square().mean() for o, c in zip(output[-1], content, strict=True)) / 2
    wanted_style = 0.0
    for o, s in zip(output, style, strict=True):
        for image in range(2):
            for channel in range(o.shape[1]):
                a, b = o[image, channel].flatten(), s[image, channel].flatten()
                means = (a.mean() - b.mean()) ** 2
                stds = [(x.sub(x.mean()).square().mean() + EPS).sqrt() for x in (a, b)]
                wanted_style += (means + (stds[0] - stds[1]) ** 2) / (2 * o.shape[1])
    found = losses(output, content, style)
    torch.testing.assert_close(found["content_loss"], wanted_content.float())
    torch.testing.assert_close(found["style_loss"], wanted_style.float())
    torch.testing.assert_close(found["loss"], 2 * found["content_loss"] + 3 * found["style_loss"])
    assert set(found) == {"loss", "content_loss", "style_loss"}


def test_statistics_are_torchs_and_so_are_their_gradients():
    from adaconv.training.losses import _ChannelStatistics, channel_statistics

    x = features(3)[0].requires_grad_()
    assert torch.autograd.gradcheck(_ChannelStatistics.apply, (x,))
    for layout in (torch.contiguous_format, torch.channels_last):
        # A mean far from zero, where E[x²] - E[x]² would keep three digits of the deviation.
        wide = (torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(0)) + 100).to(memory_format=layout)
        std, mean = torch.std_mean(wide.double(), dim=(2, 3), correction=0)
        for found, wanted in zip(channel_statistics(wide), (mean, std), strict=True):
            torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=0)


def test_a_normalised_content_target_does_not_see_means_and_deviations():
    content = features(2)
    changed = [*content[:-1], content[-1] * 3 + torch.arange(8.0)[:, None, None]]
    assert losses(changed, content[-1], content)["content_loss"] > 1
    assert losses(changed, content[-1], content, content_target="normalised")["content_loss"] < 1e-3
    other = losses(features(5), content[-1], content, content_target="normalised")["content_loss"]
    assert other > 0.5


def test_the_gradient_of_bfloat16_statistics_keeps_its_balance():
    """A deviation does not change when all pixels move together, so its gradient sums to nothing over the map."""
    from adaconv.training.losses import channel_statistics

    generator = torch.Generator().manual_seed(0)
    coarse = (torch.randn(1, 4, 64, 64, generator=generator) + 10).bfloat16().requires_grad_()
    exact = coarse.detach().double().requires_grad_()
    channel_statistics(coarse)[1].sum().backward()
    (exact.var(dim=(2, 3), correction=0) + EPS).sqrt().sum().backward()
    difference = coarse.grad.double() - exact.grad
    assert difference.norm() / exact.grad.norm() < 4e-3
    assert (difference.sum(dim=(2, 3)).abs() / exact.grad.abs().sum(dim=(2, 3))).max() < 1e-3


def test_nothing_is_lost_where_everything_agrees():
    same = features(0)
    assert losses(same, same[-1], same)["loss"] == 0


def test_flat_features_have_finite_gradients():
    flat = [torch.full_like(f, 0.3, requires_grad=True) for f in features(0)]
    losses(flat, features(1)[-1], features(1))["loss"].backward()
    assert all(torch.isfinite(f.grad).all() for f in flat)


def test_optional_losses_are_there_when_asked_for():
    same, image = features(0), torch.rand(2, 3, 16, 16)
    found = losses(same, same[-1], same, identity=(image, image + 0.5), identity_weight=4.0, tv_weight=0.5)
    assert found["identity_loss"] == pytest.approx(0.25)
    assert found["tv_loss"] > 0
    assert found["loss"] == pytest.approx(4 * 0.25 + 0.5 * found["tv_loss"].item())


def test_total_variation_is_the_mean_step_between_neighbours():
    from adaconv.training.losses import _total_variation

    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 3, 4)
    assert _total_variation(ramp) == 1.0
    assert _total_variation(torch.ones(1, 1, 3, 3)) == 0.0


def test_losses_are_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        bf16 = [f.bfloat16() for f in features(0)]
        found = losses(bf16, features(1)[-1].bfloat16(), [f.bfloat16() for f in features(1)])
    assert all(value.dtype == torch.float32 for value in found.values())
