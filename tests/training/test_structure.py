"""What AdaConv is for: the structure of a style, not only its statistics, reaches the stylized image."""

import math

import pytest
import torch
from torch.nn import functional as F

from adaconv.model.encoder import VGGEncoder
from adaconv.model.encoder_weights import normalise_encoder
from adaconv.model.network import build_network
from adaconv.training.losses import style_transfer_losses

SIDE = 64
UPRIGHT, LEVEL = 0.0, math.pi / 2


def encoder_that_turns():
    """Edges of four directions first, as trained encoders have them; then features that turn as the picture turns.

    So relu1_1's means tell upright stripes from level ones, and the loss asks for them; relu4_1's are the same for
    both, and only where its values lie tells them apart.
    """
    torch.manual_seed(1)
    encoder = VGGEncoder(widths=(8, 16, 16, 32))
    slope = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    with torch.no_grad():
        for conv in encoder.convs:
            torch.nn.init.orthogonal_(conv.weight)
            torch.nn.init.zeros_(conv.bias)
            conv.weight.copy_(torch.stack([conv.weight.rot90(turn, (2, 3)) for turn in range(4)]).mean(dim=0))
        first, second = encoder.convs[0].weight.zero_(), encoder.convs[1].weight
        for index, edge in enumerate((slope, -slope, slope.T, -slope.T)):
            first[index] = edge
            first[index + 4, index % 3, 1, 1] = 1
        second[:, :4] = second[:, :4].mean(dim=1, keepdim=True)
    return encoder


def stripes(angles, generator):
    """Grey waves of 31 pixels, at random phases."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    angles, phase = angles[:, None, None], torch.rand(len(angles), 1, 1, generator=generator) * 2 * math.pi
    wave = torch.sin(0.2 * (x * angles.cos() + y * angles.sin()) + phase)
    return (0.5 + 0.4 * wave)[:, None].expand(-1, 3, -1, -1)


def textures(count, generator):
    """Grey noise of two sizes, without direction."""
    coarse = F.interpolate(torch.rand(count, 1, 5, 5, generator=generator), size=(SIDE, SIDE), mode="bicubic")
    fine = F.interpolate(torch.rand(count, 1, 16, 16, generator=generator), size=(SIDE, SIDE), mode="bilinear")
    return (0.3 * coarse + 0.7 * fine).clamp(0, 1).expand(-1, 3, -1, -1)


def direction(images):
    """Share of the gradient's energy across minus the share down: 1 for upright stripes, -1 for level ones."""
    grey = images.mean(dim=1)
    across, down = grey.diff(dim=2).square().mean(dim=(1, 2)), grey.diff(dim=1).square().mean(dim=(1, 2))
    return ((across - down) / (across + down)).mean().item()


def trained(architecture, encoder, generator, steps):
    """A network after some steps on stripes of about two directions, and its last style loss."""
    torch.manual_seed(0)
    sizes = {"descriptor_channels": 16, "groups": (32, 8, 4, 2)} if architecture == "adaconv" else {}
    net = build_network(encoder=encoder, architecture=architecture, **sizes)
    named = list(net.transfer.named_parameters())
    slow = [parameter for name, parameter in named if name.startswith("style_encoder")]
    rest = [parameter for name, parameter in named if not name.startswith("style_encoder")]
    groups = [{"params": rest, "lr": 3e-3}, {"params": slow, "lr": 3e-4}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=steps)
    for _ in range(steps):
        turns = torch.randint(0, 2, (4,), generator=generator) * LEVEL
        style = stripes(turns + 0.4 * torch.rand(4, generator=generator) - 0.2, generator)
        content = textures(4, generator)
        with torch.no_grad():
            content_features, style_features = encoder.relu4_1(content), encoder(style)
        output = net.transfer(content_features, style_features[-1])
        losses = style_transfer_losses(
            output, encoder(output), content_features, style_features, content_weight=1.0, style_weight=30.0
        )
        optimizer.zero_grad()
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(net.transfer.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    return net, losses["style_loss"].item()


@pytest.fixture(scope="module")
def turned():
    """For each architecture: the direction of what it draws for upright stripes, the same for level ones, its loss."""
    results = {}
    for architecture in ("adaconv", "adain"):
        encoder, generator = encoder_that_turns(), torch.Generator().manual_seed(1)
        upright = stripes(torch.full((8,), UPRIGHT), generator)
        normalise_encoder(encoder, [torch.cat([upright, textures(8, generator)])])
        net, loss = trained(architecture, encoder, generator, steps=250)
        content, style = textures(8, generator), stripes(torch.full((8,), UPRIGHT), generator)
        assert abs(direction(content)) < 0.2
        with torch.no_grad():
            drawn = [direction(net(content, image)) for image in (style, style.rot90(1, (2, 3)))]
        results[architecture] = (*drawn, loss)
    return results


def test_only_the_first_features_tell_how_a_style_is_turned():
    encoder, style = encoder_that_turns(), stripes(torch.full((4,), UPRIGHT), torch.Generator().manual_seed(0))
    normalise_encoder(encoder, [style])  # to a mean activation of 1, so that a difference of nothing means something
    means = [[features.mean(dim=(2, 3)) for features in encoder(image)] for image in (style, style.rot90(1, (2, 3)))]
    apart = [(along - across).abs().max().item() for along, across in zip(*means, strict=True)]
    assert apart[0] > 1
    assert max(apart[1:]) < 1e-4


def test_turning_the_style_turns_what_adaconv_draws(turned):
    """A content that it has not seen is drawn along the style's stripes."""
    along, across, _ = turned["adaconv"]
    assert along > 0.3
    assert across < -0.3


def test_turning_the_style_turns_nothing_that_adain_draws(turned):
    """It is told relu4_1's statistics alone, so its loss stays above that of the network that sees the map."""
    along, across, loss = turned["adain"]
    assert abs(along - across) < 0.01
    assert loss > 1.5 * turned["adaconv"][2]
