"""Where the encoder's weights come from, and what they are."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaconv.errors import WeightsError
from adaconv.model.encoder import VGGEncoder

# What the seeded filters are made of: a blur, and slopes across and down.
_FILTERS = torch.tensor(
    [[[1, 2, 1], [2, 4, 2], [1, 2, 1]], [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], [[-1, -2, -1], [0, 0, 0], [1, 2, 1]]],
    dtype=torch.float32,
) / torch.tensor([6.0, 4.0, 4.0]).view(3, 1, 1)
_AFTER_POOLING = (2, 4, 8)  # positions of conv2_1, conv3_1 and conv4_1
IMAGENET_URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"


def cached_file(spec: str) -> Path:
    """Where the file of `imagenet` or a URL is kept; a file is where it is."""
    if spec == "imagenet" or "://" in spec:
        url = IMAGENET_URL if spec == "imagenet" else spec
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        return home / "adaconv" / url.rpartition("/")[2]
    return Path(spec)


def load_encoder(spec: str, *, widths: tuple[int, int, int, int]) -> VGGEncoder:
    """An encoder with weights.

    Args:
        spec: `seeded:<n>` (He-initialised from the seed n).
        widths: channels at the four taps.

    Raises:
        WeightsError: the weights cannot be had.
    """
    kind, _, seed = spec.partition(":")
    if kind != "seeded" or not seed.isdigit():
        raise WeightsError(f"encoder.weights {spec}: expected seeded:<n>")
    return _seeded(VGGEncoder(widths=widths), int(seed))


@torch.no_grad()
def _seeded(encoder: VGGEncoder, seed: int) -> VGGEncoder:
    """Random filters, each scaled and shifted to zero mean and unit deviation over noise as smooth as pictures are.

    Without that, the channels of random layers grow alike with depth, and style statistics say nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    x = _smooth_noise(generator)
    x = (x - encoder.mean) / encoder.std
    for index, conv in enumerate(encoder.convs):
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        mixing = torch.randn(*conv.weight.shape[:2], 3, generator=generator)  # of inputs, by kind of filter
        conv.weight.copy_(torch.einsum("oik,khw->oihw", mixing, _FILTERS))
        nn.init.zeros_(conv.bias)
        if index in _AFTER_POOLING:
            x = F.max_pool2d(x, 2)
        x = conv(x)
        std, mean = torch.std_mean(x, dim=(0, 2, 3))
        conv.weight.div_(std.view(-1, 1, 1, 1))
        conv.bias.copy_(-mean / std)
        x = F.relu((x - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1))
    return encoder


def _smooth_noise(generator: torch.Generator) -> Tensor:
    """Noise with the amplitude of natural images, one over frequency: (8, 3, 128, 128) in [0, 1]."""
    side = 128
    frequency = torch.fft.fftfreq(side)[:, None].hypot(torch.fft.rfftfreq(side)[None]).clamp(min=1 / side)
    spectrum = torch.fft.rfft2(torch.randn(8, 3, side, side, generator=generator)) / frequency
    noise: Tensor = torch.fft.irfft2(spectrum)
    noise = noise + noise.mean(dim=1, keepdim=True) * 2  # colours go together
    return (0.5 + 0.25 * noise / noise.std()).clamp(0, 1)


@torch.no_grad()
def normalise_encoder(encoder: VGGEncoder, images: Iterable[Tensor]) -> None:
    """Rescale every channel to a mean activation of 1 over a sample; the features change by a factor a channel only."""
    batches = list(images)
    means: list[Tensor] = []
    for batch in batches:
        for index, (_, x) in enumerate(encoder._walk(batch)):
            mean = x.mean(dim=(0, 2, 3)) * (len(batch) / sum(map(len, batches)))
            if index == len(means):
                means.append(torch.zeros_like(mean))
            means[index] += mean
    before: Tensor | None = None
    for conv, mean in zip(encoder.convs, means, strict=True):
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        # A channel that hardly ever fires must not become the loudest where it does.
        scale = mean.clamp(min=0.1 * mean.mean().item() + 1e-6)
        if before is not None:
            conv.weight.mul_(before.view(1, -1, 1, 1))
        conv.weight.div_(scale.view(-1, 1, 1, 1))
        conv.bias.div_(scale)
        before = scale


def fingerprint(encoder: VGGEncoder) -> str:
    """sha256 over the weights' bytes: 64 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()
