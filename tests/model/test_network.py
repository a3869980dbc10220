"""What the network promises: shapes, independence, gradients, sizes."""

import pytest
import torch

from adaconv.model.adaptive_conv import adaptive_conv
from adaconv.model.encoder import VGGEncoder
from adaconv.model.encoder_weights import load_encoder
from adaconv.model.kernels import AdaConvKernels
from adaconv.model.network import build_network
from adaconv.training.losses import style_transfer_losses

WIDTHS = (4, 8, 8, 16)
TINY = {"descriptor_channels": 8, "groups": (16, 4, 2, 1)}


def network(architecture="adaconv", seed=0, **changes):
    torch.manual_seed(seed)
    encoder = load_encoder("seeded:0", widths=WIDTHS)
    return build_network(encoder=encoder, architecture=architecture, **{**TINY, **changes})


def paper(**changes):
    """The paper's network without memory."""
    with torch.device("meta"):
        return build_network(encoder=VGGEncoder(), **changes)


def smooth_images(count, side, seed):
    small = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(small, size=(side, side), mode="bicubic").clamp(0, 1)


def count(module):
    return sum(p.numel() for p in module.parameters())


VARIANTS = {
    "base": {},
    "no base": {"identity_base": False},
    "plain descriptor": {"descriptor_norm": False},
    "activation first": {"style_block": "conv_act_pool"},
    "zeros": {"predictor_padding_mode": "zeros"},
    "valid": {"predictor_padding": "valid", "descriptor_size": 4},
    "valid 5": {"predictor_padding": "valid", "descriptor_size": 5},
    "kernel 5": {"kernel_size": 5, "descriptor_size": 5},
    "kernel 7": {"kernel_size": 7, "descriptor_size": 7},
    "kernel 5 of a larger descriptor": {"kernel_size": 5, "descriptor_size": 6, "predictor_padding": "valid"},
    "convolutions": {"decoder_convs": (1, 2, 2, 4)},
    "sigmoid": {"output_activation": "sigmoid"},
}


def images(count, height, width, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


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
    net = network().eval().double()  # CPUs round float32 in ways of their own
    content, style = images(3, 32, 32).double(), images(3, 32, 32, seed=1).double()
    together = net(content, style)
    for index in range(3):
        alone = net(content[index : index + 1], style[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-9, atol=1e-9)


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


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_constant_images_give_finite_outputs_and_gradients(value):
    net = network()
    out = net(torch.full((1, 3, 32, 32), value), torch.full((1, 3, 32, 32), value))
    out.square().mean().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in net.transfer.parameters())


def test_the_papers_network_has_the_papers_size():
    net = paper(identity_base=False)
    assert count(net.transfer) == 59_320_323
    assert count(net.encoder) == 3_505_728
    for predictor in net.transfer.predictors:
        assert predictor.depthwise.out_channels * 9 == 4608
        assert predictor.pointwise.out_channels == 512
    assert [count(predictor) for predictor in net.transfer.predictors] == [2_885_120, 2_753_792, 2_688_128, 2_655_296]
    assert count(net.transfer.scales) == 3_505_219
    based = paper()
    assert count(based.transfer) - count(net.transfer) == sum(
        p.per_group * p.channels * 10 for p in net.transfer.predictors
    )


@pytest.mark.parametrize(("size", "linear", "depthwise"), [(4, 67_117_056, 1_049_088), (5, 104_870_400, 2_359_808)])
def test_a_larger_descriptor_has_the_stated_size(size, linear, depthwise):
    """W of 4x4 is read by a 2x2 convolution, one of 5x5 by 3x3, both without padding."""
    net = paper(descriptor_size=size, predictor_padding="valid")
    assert count(net.transfer.style_encoder.linear) == linear
    assert {count(predictor.depthwise) for predictor in net.transfer.predictors} == {depthwise}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_maps_any_size_and_trains(variant):
    net = network(**VARIANTS[variant])
    out = net(images(2, 41, 50), images(2, 33, 70, seed=1))
    assert out.shape == (2, 3, 41, 50)
    out.square().mean().backward()
    silent = [name for name, p in net.transfer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []
    assert all(p.grad is None for p in net.encoder.parameters())
    code = net.encode_style(images(1, 33, 70))
    size = VARIANTS[variant].get("kernel_size", 3)
    assert code["kernels.3.depthwise"].shape == (1, 4, 4, size, size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"descriptor_size": 5}, "5x5 gives no kernels of 3x3 with predictor_padding same"),
        ({"descriptor_size": 3, "kernel_size": 5, "predictor_padding": "valid"}, "it must be at least as large"),
        ({"descriptor_size": 4, "kernel_size": 4}, "kernels of 4x4 have no middle"),
        ({"groups": (16, 3, 2, 1)}, "3 groups do not divide the 8 channels"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        network(**changes)


def test_an_untrained_block_is_instance_norm_with_the_base_alone():
    net = network()
    for predictor in net.transfer.predictors:
        for conv in (predictor.depthwise, predictor.pointwise, predictor.bias):
            torch.nn.init.zeros_(conv.weight)
    code = net.encode_style(images(1, 32, 32))
    x = torch.randn(1, 16, 6, 5)
    kernels = AdaConvKernels(*(code[f"kernels.0.{name}"] for name in AdaConvKernels._fields))
    torch.testing.assert_close(adaptive_conv(x, kernels, groups=16), torch.nn.functional.instance_norm(x))


def test_adain_takes_its_statistics_in_float32_under_autocast():
    """In bfloat16 the outputs' channel means miss those of the style."""
    transfer = network("adain").transfer
    seen = []
    transfer.scales[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    content, style = torch.rand(2, 16, 12, 12).bfloat16() + 9, torch.rand(2, 16, 12, 12).bfloat16() + 9
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        transfer(content, style)
    means = [features.float().mean(dim=(2, 3)) for features in (*seen, style)]
    torch.testing.assert_close(*means, rtol=1e-5, atol=0)


@pytest.mark.parametrize("feature_scale", [0.3, 1.0, 3.0])
def test_the_scale_of_the_encoder_does_not_reach_the_kernels(feature_scale):
    """Without a normalised descriptor stylized images grow with the square of the encoder's scale."""
    net = network()
    features = net.encoder.relu4_1(images(1, 64, 64))
    ours, plain = (net.transfer.predict(features * s)["kernels.0.depthwise"] for s in (feature_scale, 1.0))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_overfitting_four_pairs_lowers_both_losses_and_styles_differ():
    """Content and style loss of the same 4 pairs fall together; a content with two styles gives two pictures."""
    net = network(seed=1)
    content, style = smooth_images(4, 48, seed=5), smooth_images(4, 48, seed=6)
    with torch.no_grad():
        content_features, style_features = net.encoder.relu4_1(content), net.encoder(style)
    optimizer = torch.optim.Adam(net.transfer.parameters(), lr=3e-3)
    history = []
    for _ in range(200):
        output = net.transfer(content_features, style_features[-1])
        losses = style_transfer_losses(
            output, net.encoder(output), content_features, style_features, content_weight=1.0, style_weight=1.0
        )
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        history.append((losses["content_loss"].item(), losses["style_loss"].item()))
    assert history[-1][0] < 0.5 * history[0][0]
    assert history[-1][1] < 0.1 * history[0][1]
    with torch.no_grad():
        outs = net(content[:1].expand(4, -1, -1, -1), style)
    assert min((outs[i] - outs[j]).abs().mean() for i in range(4) for j in range(i)) > 0.001
