"""What AdaConv is for: the structure of a style, not only its colours, reaches the stylized image."""

import math

import torch
from torch.nn import functional as F

from adaconv.model.encoder import VGGEncoder
from adaconv.model.encoder_weights import normalise_encoder
from adaconv.model.network import build_network
from adaconv.training.losses import style_transfer_losses

SIDE = 48


def encoder_with_edges(seed):
    """Rising and falling edges of both directions first, as trained encoders have them; rotations of channels after."""
    torch.manual_seed(seed)
    encoder = VGGEncoder(widths=(8, 16, 16, 32))
    for conv in encoder.convs:
        torch.nn.init.orthogonal_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    slope = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    with torch.no_grad():
        first = encoder.convs[0].weight.zero_()
        for index, edge in enumerate((slope, -slope, slope.T, -slope.T)):
            first[index] = edge
            first[index + 4, index % 3, 1, 1] = 1
    return encoder


def gratings(angles, generator):
    """Grey waves of 7 pixels, at random phases."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    angles, phase = angles[:, None, None], torch.rand(len(angles), 1, 1, generator=generator) * 2 * math.pi
    wave = torch.sin(0.9 * (x * angles.cos() + y * angles.sin()) + phase)
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


def test_turning_the_style_turns_what_is_drawn():
    """Trained on stripes of two directions, the network draws a content it has not seen along the style's."""
    encoder, generator = encoder_with_edges(seed=1), torch.Generator().manual_seed(1)
    upright = torch.zeros(8)
    normalise_encoder(encoder, [torch.cat([gratings(upright, generator), textures(8, generator)])])
    net = build_network(encoder=encoder, descriptor_channels=16, groups=(32, 8, 4, 2))
    slow = list(net.transfer.style_encoder.parameters())
    rest = [p for name, p in net.transfer.named_parameters() if not name.startswith("style_encoder")]
    optimizer = torch.optim.Adam([{"params": rest, "lr": 3e-3}, {"params": slow, "lr": 3e-4}])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=300)
    for _ in range(300):
        turns = torch.randint(0, 2, (4,), generator=generator) * math.pi / 2
        style = gratings(turns + 0.4 * torch.rand(4, generator=generator) - 0.2, generator)
        content = textures(4, generator)
        with torch.no_grad():
            content_features, style_features = encoder.relu4_1(content), encoder(style)
        output = net.transfer(content_features, style_features[-1])
        losses = style_transfer_losses(
            output, encoder(output), content_features, style_features, content_weight=1.0, style_weight=10.0
        )
        optimizer.zero_grad()
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(net.transfer.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    content, style = textures(8, generator), gratings(upright, generator)
    with torch.no_grad():
        along, turned = direction(net(content, style)), direction(net(content, style.rot90(1, (2, 3))))
    assert abs(direction(content)) < 0.2
    assert along > 0.3
    assert turned < -0.3
