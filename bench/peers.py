"""What ours is measured against: two public implementations, written anew from what they do.

    RElbersAdaConv   RElbers/ada-conv-pytorch, the best-known AdaConv: a loop over the batch, two convolutions an image
    NaotoAdaIN       naoto0804/pytorch-AdaIN, the reference of AdaIN: statistics at relu4_1 alone

Layers come in the order and under the parameter names of those repositories, so that their weights load here and
`adaconv.model.convert` can be tested without them. Weights are torch's random ones: speed does not depend on them.
Widths may be narrowed; what is measured is (64, 128, 256, 512).

Letters: B batch, C channels, G groups, S descriptor channels, k kernel size, H W height and width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Widths = tuple[int, int, int, int]
VGG_WIDTHS: Widths = (64, 128, 256, 512)
PEERS = {"adaconv": "RElbers' AdaConv", "adain": "naoto0804's AdaIN"}
_DECODER_CONVS = (1, 4, 2, 2)  # of each scale, coarsest first; an adaptive block counts as its fixed convolution


def _reflect_conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, padding_mode="reflect")


class RElbersAdaConv(nn.Module):
    """(B, 3, H, W) contents and (B, 3, style_size, style_size) styles in [0, 1] -> (B, 3, H, W).

    H and W are multiples of 8.

    Args:
        widths: channels at relu1_1, relu2_1, relu3_1 and relu4_1.
        descriptor_channels: S of the style descriptor.
        style_size: the only size of a style that the linear layer takes, a multiple of 64.
    """

    def __init__(self, *, widths: Widths = VGG_WIDTHS, descriptor_channels: int = 512, style_size: int = 256) -> None:
        super().__init__()
        self.encoder = _TorchvisionEncoder(widths)
        self.style_encoder = _GlobalStyleEncoder(widths[-1], descriptor_channels, style_size)
        self.decoder = _AdaConvDecoder(widths, descriptor_channels)

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        return self.embed(content, style)[0]

    def embed(self, content: Tensor, style: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The stylized image; relu1_1 ... relu4_1 of the content, all kept, and of the style."""
        of_content, of_style = self.encoder(content), self.encoder(style)
        return self.decoder(of_content[-1], self.style_encoder(of_style[-1])), of_content, of_style


class _TorchvisionEncoder(nn.Module):
    """torchvision's VGG-19, cut after each of the four maps: `blocks.<map>.<layer>`."""

    mean: Tensor
    std: Tensor

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        one, two, three, four = widths
        channels = ([(3, one)], [(one, one), (one, two)], [(two, two), (two, three)], [(three, three)] * 3)
        channels[-1].append((three, four))
        self.blocks = nn.ModuleList(self._block(pairs) for pairs in channels)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    @staticmethod
    def _block(channels: Sequence[tuple[int, int]]) -> nn.Sequential:
        layers: list[nn.Module] = []
        for position, pair in enumerate(channels):
            if position and position == len(channels) - 1:  # a map's own convolution follows a pooling
                layers.append(nn.MaxPool2d(2))
            layers += [_reflect_conv(*pair), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, image: Tensor) -> list[Tensor]:
        x, maps = (image - self.mean) / self.std, []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return maps


class _GlobalStyleEncoder(nn.Module):
    def __init__(self, channels: int, descriptor_channels: int, style_size: int) -> None:
        super().__init__()
        stages = [
            layer for _ in range(3) for layer in (_reflect_conv(channels, channels), nn.LeakyReLU(), nn.AvgPool2d(2))
        ]
        self.downscale = nn.Sequential(*stages)
        self.fc = nn.Linear(channels * (style_size // 64) ** 2, descriptor_channels * 9)
        self.shape = (descriptor_channels, 3, 3)

    def forward(self, features: Tensor) -> Tensor:
        descriptor: Tensor = self.fc(self.downscale(features).flatten(1))
        return descriptor.reshape(-1, *self.shape)


class _KernelPredictor(nn.Module):
    """A descriptor to kernels: depthwise (B, C, C/G, 3, 3), pointwise (B, C, C/G, 1, 1), bias (B, C)."""

    def __init__(self, descriptor_channels: int, channels: int, groups: int) -> None:
        super().__init__()
        self.channels, self.per_group = channels, channels // groups
        self.spatial = _reflect_conv(descriptor_channels, channels * self.per_group)
        self.pointwise, self.bias = (
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(descriptor_channels, outputs, 1))
            for outputs in (channels * self.per_group, channels)
        )

    def forward(self, descriptor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kernels = (len(descriptor), self.channels, self.per_group)
        return (
            self.spatial(descriptor).reshape(*kernels, 3, 3),
            self.pointwise(descriptor).reshape(*kernels, 1, 1),
            self.bias(descriptor).flatten(1),
        )


class _AdaConv2d(nn.Module):
    """Instance norm, then image by image a depthwise and a pointwise convolution; the fixed convolution for all."""

    def __init__(self, channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.conv = _reflect_conv(channels, out_channels)

    def forward(self, x: Tensor, depthwise: Tensor, pointwise: Tensor, bias: Tensor) -> Tensor:
        normal, filtered = F.instance_norm(x), []
        for index in range(len(x)):
            padded = F.pad(normal[index : index + 1], (1, 1, 1, 1), mode="reflect")
            one = F.conv2d(padded, depthwise[index], groups=self.groups)
            filtered.append(F.conv2d(one, pointwise[index], bias[index], groups=self.groups))
        result: Tensor = self.conv(torch.cat(filtered))
        return result


class _AdaConvDecoder(nn.Module):
    """One list of layers for all scales: predictor, adaptive block, activations, convolutions, upsampling."""

    def __init__(self, widths: Widths, descriptor_channels: int) -> None:
        super().__init__()
        scales = widths[::-1]
        layers: list[nn.Module] = []
        for scale, (channels, after, count) in enumerate(zip(scales, (*scales[1:], 3), _DECODER_CONVS, strict=True)):
            groups = channels // 2**scale
            layers.append(_KernelPredictor(descriptor_channels, channels, groups))
            for position in range(count):
                out = after if position == count - 1 else channels
                layers.append(_reflect_conv(channels, out) if position else _AdaConv2d(channels, out, groups))
                if out != 3:
                    layers.append(nn.ReLU())
            if after != 3:
                layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, descriptor: Tensor) -> Tensor:
        kernels: tuple[Tensor, ...] = ()
        for layer in self.layers:
            if isinstance(layer, _KernelPredictor):
                kernels = layer(descriptor)
            else:
                x = layer(x, *kernels) if isinstance(layer, _AdaConv2d) else layer(x)
        return x


def relbers_step(network: RElbersAdaConv) -> Callable[[Tensor, Tensor], float]:
    """An update as they do it: three encoder passes, losses without eps, torch's default Adam. Returns the loss."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)

    def step(content: Tensor, style: Tensor) -> float:
        output, of_content, of_style = network.embed(content, style)
        of_output = network.encoder(output)
        loss = F.mse_loss(of_content[-1], of_output[-1])
        for theirs, own in zip(of_style, of_output, strict=True):
            loss = loss + 10 * F.mse_loss(theirs.mean(dim=(2, 3)), own.mean(dim=(2, 3)))
            loss = loss + 10 * F.mse_loss(theirs.std(dim=(2, 3)), own.std(dim=(2, 3)))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    return step


class NaotoAdaIN(nn.Module):
    """(B, 3, H, W) contents and styles in [0, 1] -> (B, 3, H, W); H and W multiples of 8.

    Args:
        widths: channels at relu1_1, relu2_1, relu3_1 and relu4_1.
    """

    def __init__(self, *, widths: Widths = VGG_WIDTHS) -> None:
        super().__init__()
        one, two, three, four = widths
        # A 1x1 convolution prepares the image; paddings are layers of their own.
        self.enc_1 = nn.Sequential(nn.Conv2d(3, 3, 1), *self._convs((3, one)))
        self.enc_2 = nn.Sequential(*self._convs((one, one)), self._pool(), *self._convs((one, two)))
        self.enc_3 = nn.Sequential(*self._convs((two, two)), self._pool(), *self._convs((two, three)))
        self.enc_4 = nn.Sequential(*self._convs(*[(three, three)] * 3), self._pool(), *self._convs((three, four)))
        self.requires_grad_(False)
        decoder: list[nn.Module] = []
        scales = widths[::-1]
        for channels, after, count in zip(scales, (*scales[1:], 3), _DECODER_CONVS, strict=True):
            decoder += self._convs(*[(channels, channels)] * (count - 1), (channels, after))
            decoder.append(nn.Upsample(scale_factor=2, mode="nearest"))
        self.decoder = nn.Sequential(*decoder[:-2])  # nothing follows the image's convolution

    @staticmethod
    def _convs(*channels: tuple[int, int]) -> list[nn.Module]:
        return [layer for pair in channels for layer in (nn.ReflectionPad2d(1), nn.Conv2d(*pair, 3), nn.ReLU())]

    @staticmethod
    def _pool() -> nn.MaxPool2d:
        return nn.MaxPool2d(2, ceil_mode=True)

    def encode(self, image: Tensor) -> list[Tensor]:
        """relu1_1 ... relu4_1."""
        maps = [image]
        for stage in (self.enc_1, self.enc_2, self.enc_3, self.enc_4):
            maps.append(stage(maps[-1]))
        return maps[1:]

    def transfer(self, of_content: Tensor, of_style: Tensor) -> Tensor:
        """relu4_1 of the content with the statistics of the style's."""
        style_mean, style_std = _mean_std(of_style)
        mean, std = _mean_std(of_content)
        return (of_content - mean) / std * style_std + style_mean

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        image: Tensor = self.decoder(self.transfer(self.encode(content)[-1], self.encode(style)[-1]))
        return image


def _mean_std(features: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, 1, 1) each."""
    flat = features.flatten(2)
    return flat.mean(dim=2)[..., None, None], (flat.var(dim=2) + 1e-5).sqrt()[..., None, None]


def naoto_step(network: NaotoAdaIN) -> Callable[[Tensor, Tensor], float]:
    """An update as they do it: the content loss is towards the transferred features. Returns the loss."""
    optimizer = torch.optim.Adam(network.decoder.parameters(), lr=1e-4)

    def step(content: Tensor, style: Tensor) -> float:
        of_style = network.encode(style)
        target = network.transfer(network.encode(content)[-1], of_style[-1])
        of_output = network.encode(network.decoder(target))
        loss = F.mse_loss(of_output[-1], target)
        for own, theirs in zip(of_output, of_style, strict=True):
            for a, b in zip(_mean_std(own), _mean_std(theirs), strict=True):
                loss = loss + 10 * F.mse_loss(a, b)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    return step
