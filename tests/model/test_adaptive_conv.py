"""The fast path against the loop that defines it: values, gradients, precision, edges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaconv.model.adaptive_conv import adaptive_conv, adaptive_conv_reference
from adaconv.model.kernels import EPS, AdaConvKernels, compose, instance_scale

PAPER = [(512, 512, 32), (256, 128, 64), (128, 32, 128), (64, 8, 256)]  # channels, groups, side of the map at 256 px


def kernels_of(batch, channels, per_group, size, *, seed=0, dtype=torch.float64, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(requires_grad)

    return AdaConvKernels(
        draw(batch, channels, per_group, size, size), draw(batch, channels, per_group, 1, 1), draw(batch, channels)
    )


def maps(batch, channels, height, width, *, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, height, width, generator=generator, dtype=dtype)


def relative(ours, wanted):
    """Largest difference over the largest value."""
    return ((ours.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 4),
    channels=st.sampled_from([4, 8, 12, 16]),
    groups=st.sampled_from([1, 2, 4]),
    size=st.sampled_from([1, 3, 5, 7]),
    height=st.integers(4, 12),
    width=st.integers(4, 12),
)
def test_the_fast_path_is_the_reference(batch, channels, groups, size, height, width):
    x = maps(batch, channels, height, width)
    kernels = kernels_of(batch, channels, channels // groups, size)
    ours = adaptive_conv(x, kernels, groups=groups)
    torch.testing.assert_close(ours, adaptive_conv_reference(x, kernels, groups=groups), rtol=1e-10, atol=1e-10)


def test_what_rounding_leaves_of_a_constant_is_flat_and_nothing_else_is():
    """Beside channels of a picture; 2e-5 of the mean is one, too. A flat channel has no gradient."""
    x = maps(1, 4, 12, 12, dtype=torch.float32)
    x[:, 1] = 5 + 1e-6 * x[:, 1]
    x[:, 2] = 5 + 1e-4 * x[:, 2]
    mean, variance = x.mean(dim=(2, 3)), x.var(dim=(2, 3), correction=0)
    expected = (variance + EPS).rsqrt()
    expected[:, 1] = 0
    assert torch.equal(instance_scale(mean, variance), expected)
    x, kernels = x.requires_grad_(), kernels_of(1, 4, 2, 3, dtype=torch.float32)
    ours = adaptive_conv(x, kernels, groups=2)
    assert relative(ours, adaptive_conv_reference(x, kernels, groups=2)) < 1e-5
    (gradient,) = torch.autograd.grad(ours.square().sum(), x)
    assert not gradient[:, 1].any()
    assert gradient[:, [0, 2, 3]].flatten(2).any(dim=2).all()


@pytest.mark.parametrize(
    ("channels", "groups", "size", "height", "width"),
    [(8, 8, 3, 5, 4), (8, 4, 3, 2, 5), (8, 2, 5, 4, 3), (6, 2, 3, 3, 2), (16, 4, 7, 4, 6), (8, 1, 1, 2, 2)],
)
def test_gradients_are_those_of_finite_differences(channels, groups, size, height, width):
    """Maps as small as padding admits among them, where one pixel is mirrored to both sides."""
    x = maps(2, channels, height, width).requires_grad_()
    kernels = kernels_of(2, channels, channels // groups, size, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *k: adaptive_conv(x, AdaConvKernels(*k), groups=groups), (x, *kernels))


@pytest.mark.parametrize(("channels", "groups", "side"), [(c, g, s // 4) for c, g, s in PAPER])
def test_float32_is_within_1e_5_of_float64_at_the_papers_scales(channels, groups, side):
    """Values and all gradients, at a quarter of the papers map, features as after a ReLU."""
    x = maps(2, channels, side, side).relu()
    kernels = kernels_of(2, channels, channels // groups, 3)
    grad = maps(2, channels, side, side, seed=2)
    found = []
    for function, dtype in ((adaptive_conv, torch.float32), (adaptive_conv_reference, torch.float64)):
        inputs = [t.to(dtype).requires_grad_() for t in (x, *kernels)]
        out = function(inputs[0], AdaConvKernels(*inputs[1:]), groups=groups)
        out.backward(grad.to(dtype))
        found.append([out.detach(), *(t.grad for t in inputs)])
    for ours, wanted in zip(*found, strict=True):
        assert relative(ours, wanted) < 1e-5


@pytest.mark.parametrize("level", [0.0, 1.0, 100.0])
def test_a_constant_channel_is_silent(level):
    """Its deviation is 0: rounding must not be amplified, and gradients stay finite."""
    x = maps(1, 8, 16, 16, dtype=torch.float32)
    x[:, 3] = level
    x.requires_grad_()
    kernels = kernels_of(1, 8, 1, 3, dtype=torch.float32, requires_grad=True)
    out = adaptive_conv(x, kernels, groups=8)
    torch.testing.assert_close(out[0, 3], kernels.bias[0, 3].expand(16, 16), rtol=0, atol=2e-3 * max(level, 1) / 100)
    out.square().sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (x, *kernels))


def test_a_channel_far_from_zero_keeps_its_precision():
    """Folding the mean into the bias instead would lose four digits here."""
    x = maps(1, 8, 24, 24) + 1000
    kernels = kernels_of(1, 8, 4, 3)
    ours = adaptive_conv(x.float(), AdaConvKernels(*(k.float() for k in kernels)), groups=2)
    wanted = adaptive_conv_reference(x.float().double(), kernels, groups=2)
    assert relative(ours, wanted) < 1e-4


def test_one_style_serves_a_batch():
    x, kernels = maps(3, 8, 6, 7), kernels_of(1, 8, 2, 3)
    expanded = AdaConvKernels(*(k.expand(3, *k.shape[1:]) for k in kernels))
    torch.testing.assert_close(
        adaptive_conv(x, kernels, groups=4), adaptive_conv_reference(x, expanded, groups=4), rtol=1e-10, atol=1e-10
    )


def test_layout_does_not_matter():
    x, kernels = maps(2, 8, 6, 7), kernels_of(2, 8, 2, 3)
    wanted = adaptive_conv(x, kernels, groups=4)
    torch.testing.assert_close(
        adaptive_conv(x.contiguous(memory_format=torch.channels_last), kernels, groups=4), wanted
    )


def test_bfloat16_features_are_filtered_in_float32_on_a_cpu():
    x, kernels = maps(2, 8, 9, 9, dtype=torch.float32), kernels_of(2, 8, 4, 3, dtype=torch.float32)
    coarse = x.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours = adaptive_conv(coarse, kernels, groups=2)
    assert ours.dtype == torch.float32
    wanted = adaptive_conv_reference(coarse.detach().float(), kernels, groups=2)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    ours.sum().backward()
    assert coarse.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(("size", "side"), [(5, 2), (7, 3)])
def test_a_map_too_small_to_mirror_its_edges_is_refused(size, side):
    with pytest.raises(ValueError, match=rf"{size}x{size} need a map above {size // 2} a side, found \({side}, 9\)"):
        adaptive_conv(maps(1, 4, side, 9), kernels_of(1, 4, 2, size), groups=2)


def test_composed_kernels_have_the_stated_shape():
    assert compose(kernels_of(3, 8, 2, 3), groups=4).shape == (3, 8, 2, 3, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("channels", "groups", "side"), PAPER)
def test_a_gpu_computes_the_reference(channels, groups, side):
    x, kernels = maps(2, channels, side, side), kernels_of(2, channels, channels // groups, 3)
    wanted = adaptive_conv_reference(x, kernels, groups=groups)
    ours = adaptive_conv(x.float().cuda(), AdaConvKernels(*(k.float().cuda() for k in kernels)), groups=groups)
    assert relative(ours.cpu(), wanted) < 2e-3  # convolutions may run in TF32
