"""Where the encoder's weights come from, and what they are."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from adaconv.errors import WeightsError
from adaconv.model.encoder import VGGEncoder

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
    generator = torch.Generator().manual_seed(int(seed))
    encoder = VGGEncoder(widths=widths)
    for conv in encoder.convs:
        assert isinstance(conv, nn.Conv2d)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu", generator=generator)
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
    return encoder


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
        scale = torch.where(mean > 1e-6, mean, torch.ones_like(mean))  # a channel that never fires stays as it is
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
