"""What the network promises: shapes, independence, gradients, sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaconv.model.adaptive_conv import AdaConvKernels, adaptive_conv, adaptive_conv_reference, compose
from adaconv.model.encoder_weights import load_encoder
from adaconv.model.network import build_network

WIDTHS = (4, 8, 8, 16)
TINY = {"descriptor_channels": 8, "groups": (16, 4, 2, 1)}


def network(architecture="adaconv", seed=0):
    torch.manual_seed(seed)
    return build_network(encoder=load_encoder("seeded:0", widths=WIDTHS), architecture=architecture, **TINY)


def images(count, height, width, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def kernels_of(batch, channels, per_group, size, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return AdaConvKernels(
        draw(batch, channels, per_group, size, size), draw(batch, channels, per_group, 1, 1), draw(batch, channels)
    )


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 4),
    channels=st.sampled_from([4, 8, 12]),
    groups=st.sampled_from([1, 2, 4]),
    size=st.sampled_from([1, 3, 5]),
    height=st.integers(5, 12),
    width=st.integers(5, 12),
)
def test_the_fast_path_is_the_reference(batch, channels, groups, size, height, width):
    x = torch.randn(batch, channels, height, width, dtype=torch.float64)
    kernels = kernels_of(batch, channels, channels // groups, size)
    ours = adaptive_conv(x, kernels, groups=groups)
    torch.testing.assert_close(ours, adaptive_conv_reference(x, kernels, groups=groups), rtol=1e-10, atol=1e-10)


def test_both_paths_have_the_same_gradients():
    grads = []
    for function in (adaptive_conv, adaptive_conv_reference):
        x = torch.randn(2, 8, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        kernels = AdaConvKernels(*(k.requires_grad_() for k in kernels_of(2, 8, 4, 3)))
        function(x, kernels, groups=2).square().sum().backward()
        grads.append([x.grad, *(k.grad for k in kernels)])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_composed_kernels_have_the_stated_shape():
    assert compose(kernels_of(3, 8, 2, 3), groups=4).shape == (3, 8, 2, 3, 3)


@pytest.mark.parametrize("architecture", ["adaconv", "adain"])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (50, 71), (16, 16), (9, 100), (1, 1)])
def test_any_content_size_keeps_its_size(architecture, height, width):
    net = network(architecture)
    out = net(images(2, height, width), images(2, 40, 56))
    assert out.shape == (2, 3, height, width)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("side", [8, 31, 64, 256, 300])
def test_any_style_size_gives_a_code(side):
    assert network().encode_style(images(1, side, side + 5))["descriptor"].shape == (1, 8, 3, 3)


def test_an_image_does_not_see_its_neighbours_in_the_batch():
    net = network().eval()
    content, style = images(3, 32, 32), images(3, 32, 32, seed=1)
    together = net(content, style)
    for index in range(3):
        alone = net(content[index : index + 1], style[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-5)


def test_a_code_of_one_style_serves_a_batch_of_contents():
    net = network().eval()
    code = net.encode_style(images(1, 32, 32))
    content = images(3, 32, 32, seed=2)
    torch.testing.assert_close(net.stylize(content, code)[1:2], net.stylize(content[1:2], code), rtol=1e-4, atol=1e-5)


def test_styles_change_the_output_of_an_untrained_network():
    net = network()
    content = images(1, 32, 32)
    outs = [net(content, images(1, 32, 32, seed=seed)) for seed in (1, 2)]
    assert (outs[0] - outs[1]).abs().max() > 1e-4


def test_gradients_reach_every_weight_but_the_encoders():
    net = network()
    net(images(2, 32, 32), images(2, 32, 32, seed=1)).square().mean().backward()
    silent = [name for name, p in net.transfer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []
    assert all(p.grad is None for p in net.encoder.parameters())


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_constant_images_give_finite_outputs_and_gradients(value):
    net = network()
    out = net(torch.full((1, 3, 32, 32), value), torch.full((1, 3, 32, 32), value))
    out.square().mean().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in net.transfer.parameters())


def test_the_papers_network_has_the_papers_size():
    with torch.device("meta"):
        from adaconv.model.encoder import VGGEncoder

        net = build_network(encoder=VGGEncoder())
    base = sum(p.numel() for name, p in net.transfer.named_parameters() if "base_" in name)
    assert sum(p.numel() for p in net.transfer.parameters()) - base == 59_320_323
    assert sum(p.numel() for p in net.encoder.parameters()) == 3_505_728
    for predictor in net.transfer.predictors:
        assert predictor.depthwise.out_channels * 9 == 4608 * predictor.channels * predictor.per_group * 9 // 4608
        assert (predictor.depthwise.out_channels, predictor.pointwise.out_channels) == (512, 512)
