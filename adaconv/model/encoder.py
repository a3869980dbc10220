"""The frozen VGG-19 trunk to relu4_1 (Simonyan & Zisserman 2014) with reflect padding: images to features.

Letters: B batch, C channels, H W height and width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Convolutions between two poolings; the first of each group ends in relu1_1, relu2_1, relu3_1, relu4_1.
GROUPS = (2, 2, 4, 1)

Features = tuple[Tensor, Tensor, Tensor, Tensor]


class ReflectConv2d(nn.Conv2d):
    """(B, C, H, W) -> (B, D, H, W): a 3x3 convolution of a map that is mirrored at its borders.

    The map is padded in the dtype it has. Autocast would pad in float32 and convert there and back, to the same values:
    1.4 times the time of a bfloat16 convolution of 64 channels at 256 px, forward and backward on a CPU.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, padding_mode="reflect")

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(x, weight, bias)


class VGGEncoder(nn.Module):
    """relu1_1 ... relu4_1 of an image.

    Always in eval mode and without gradients for its weights; gradients flow through it to its input.

    Args:
        widths: channels at relu1_1, relu2_1, relu3_1 and relu4_1; (64, 128, 256, 512) is VGG-19.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, widths: tuple[int, int, int, int] = (64, 128, 256, 512)) -> None:
        super().__init__()
        self.widths = widths
        self.convs = nn.ModuleList()
        channels = 3
        for width, count in zip(widths, GROUPS, strict=True):
            for _ in range(count):
                self.convs.append(ReflectConv2d(channels, width))
                channels = width
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "VGGEncoder":
        return super().train(False)

    def forward(self, image: Tensor) -> Features:
        """(B, 3, H, W) in [0, 1] -> relu1_1 (B, C1, H, W), relu2_1 (B, C2, H/2, W/2), relu3_1, relu4_1 (H/8, W/8)."""
        one, two, three, four = (x for is_tap, x in self._walk(image) if is_tap)
        return one, two, three, four

    def relu4_1(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, C4, H/8, W/8); the other maps are let go."""
        features = image
        for _, features in self._walk(image):  # noqa: B007
            pass
        return features

    def _walk(self, image: Tensor) -> Iterator[tuple[bool, Tensor]]:
        """Every convolution's output in order, and whether it is one of the four that are asked for."""
        x = (image - self.mean) / self.std
        convs = iter(self.convs)
        for group, count in enumerate(GROUPS):
            for position in range(count):
                if group and position == 0:
                    x = F.max_pool2d(x, 2)
                x = F.relu(next(convs)(x), inplace=False)
                yield position == 0, x
