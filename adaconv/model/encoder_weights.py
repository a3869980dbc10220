"""Where the encoder's weights come from, and what they are."""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from adaconv.download import DownloadError, download
from adaconv.errors import WeightsError
from adaconv.model.encoder import TAPS, THEN, VGGEncoder

IMAGENET_URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"  # torchvision's VGG19_Weights.IMAGENET1K_V1
IMAGENET_SHA256 = "dcbb9e9d"  # its first digits, as torchvision publishes and checks them
# Positions of the nine convolutions up to relu4_1, in torchvision's `features` and in the `vgg_normalised` of AdaIN,
# where a 1x1 convolution that prepares the image comes first and every padding is a layer.
_TORCHVISION = tuple(f"features.{index}" for index in (0, 2, 5, 7, 10, 12, 14, 16, 19))
_NORMALISED = tuple(str(index) for index in (2, 5, 9, 12, 16, 19, 22, 25, 29))
_PREPARATION = "0"

# What the seeded filters are made of: a blur, and slopes across and down.
_FILTERS = torch.tensor(
    [[[1, 2, 1], [2, 4, 2], [1, 2, 1]], [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], [[-1, -2, -1], [0, 0, 0], [1, 2, 1]]],
    dtype=torch.float32,
) / torch.tensor([6.0, 4.0, 4.0]).view(3, 1, 1)
_EDGE_SHARE = 0.1
_OPPONENTS = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [0.5, 0.5, -1.0]])  # light, red-green, yellow-blue


def cached_file(spec: str) -> Path:
    """Where the file of `imagenet` or a URL is kept; a file is where it is."""
    if spec == "imagenet" or "://" in spec:
        url, _ = _url_and_hash(spec)
        name = urlsplit(url).path.rpartition("/")[2]  # a query says nothing of what the file is, and may be long
        home = Path(os.environ.get("XDG_CACHE_HOME", ""))
        home = (home if home.is_absolute() else Path.home() / ".cache") / "adaconv"  # others are invalid, says XDG
        if spec == "imagenet":
            return home / name
        return home / hashlib.sha256(url.encode()).hexdigest()[:8] / name  # many are `model.pth`
    return Path(spec).expanduser()


def is_here(spec: str) -> bool:
    """Whether the weights can be had without a download."""
    return spec.startswith("seeded:") or cached_file(spec).is_file()


def require_source(spec: str, *, file_here: bool = True) -> None:
    """Refuse what no weights can come from; nothing is downloaded.

    Args:
        spec: as in `load_encoder`.
        file_here: whether a file must be on this machine: the nodes of a cluster may have it, and it not.

    Raises:
        WeightsError: what it is, and what was expected.
    """
    kind, _, seed = spec.partition(":")
    if kind == "seeded":
        if not re.fullmatch("[0-9]{1,18}", seed):  # what torch takes
            raise WeightsError(f"encoder.weights {spec}: expected seeded:<n> with a whole number, such as seeded:0")
    elif spec == "imagenet" or "://" in spec:
        _url_and_hash(spec)
    elif file_here and not cached_file(spec).is_file():
        raise WeightsError(
            f"encoder.weights {spec}: expected imagenet, seeded:<n>, a URL or a file, found no such file"
        )


def load_encoder(spec: str, *, widths: tuple[int, int, int, int] = (64, 128, 256, 512)) -> VGGEncoder:
    """An encoder with weights.

    Args:
        spec: `imagenet` (torchvision's file, downloaded once), a URL or a file (torchvision's or `vgg_normalised`
            names; .pth or .safetensors; a URL may end in `#sha256=...`), or `seeded:<n>` (random filters).
        widths: channels at the four taps.

    Raises:
        WeightsError: the weights cannot be had, or are not those of a VGG-19 of these widths.
    """
    require_source(spec)
    encoder = VGGEncoder(widths=widths)
    if spec.startswith("seeded:"):
        return _seeded(encoder, int(spec.partition(":")[2]))
    path = cached_file(spec)
    if spec == "imagenet" or "://" in spec:
        url, sha256 = _url_and_hash(spec)
        try:
            download(url, path, sha256=sha256)
        except DownloadError as error:
            raise WeightsError(
                f"encoder.weights {spec}: {error}. Without internet, bring that file here as {path}, or train with "
                "--encoder.weights seeded:0 to see the system work (not for quality)"
            ) from error
    _copy_weights(encoder, _read_tensors(path), str(path))
    return encoder


def _url_and_hash(spec: str) -> tuple[str, str | None]:
    if spec == "imagenet":
        return IMAGENET_URL, IMAGENET_SHA256
    url, marked, pin = spec.partition("#")
    if marked and not re.fullmatch("sha256=[0-9a-f]{8,64}", pin, re.IGNORECASE):  # what is misspelt would check nothing
        raise WeightsError(
            f"encoder.weights {spec}: expected #sha256= and 8 to 64 hex digits after the URL, found #{pin}"
        )
    return url, pin.lower().removeprefix("sha256=") or None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # bytes that are no pickle may end in any
        # torch's message of a pickle advises to load it unsafely.
        told = isinstance(error, (SafetensorError, RuntimeError, OSError))
        why = str(error).partition("\n")[0] if told else "it holds other objects, or is no file of torch's"
        raise WeightsError(
            f"{path} is no file of weights that is safe to read ({why}); expected .safetensors, or a .pth that holds "
            "nothing but tensors"
        ) from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: expected a state dict (names to tensors), found a {type(found).__name__}")
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


@torch.no_grad()
def _copy_weights(encoder: VGGEncoder, tensors: dict[str, Tensor], path: str) -> None:
    if f"{_TORCHVISION[0]}.weight" in tensors:
        names = _TORCHVISION
    elif f"{_NORMALISED[0]}.weight" in tensors:
        names = _NORMALISED
        tensors = _fold_preparation(encoder, tensors, path)
    else:
        raise WeightsError(
            f"{path}: expected VGG-19 weights named features.0.weight (torchvision) or 2.weight (vgg_normalised), "
            f"found {', '.join(sorted(tensors)[:5]) or 'no tensors'}"
        )
    for name, conv in zip(names, encoder.convs, strict=True):
        for part in ("weight", "bias"):
            own = getattr(conv, part)
            _expect(tensors, f"{name}.{part}", tuple(own.shape), path)
            own.copy_(tensors[f"{name}.{part}"])


def _fold_preparation(encoder: VGGEncoder, tensors: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """`vgg_normalised` prepares the image by a 1x1 convolution, ours by mean and std: rewrite its first layer for ours.

    A map of single pixels goes through reflect padding unchanged, so the two are one convolution.
    """
    first = _NORMALISED[0]
    for name, shape in (
        (f"{_PREPARATION}.weight", (3, 3, 1, 1)),
        (f"{_PREPARATION}.bias", (3,)),
        (f"{first}.weight", (encoder.widths[0], 3, 3, 3)),
        (f"{first}.bias", (encoder.widths[0],)),
    ):
        _expect(tensors, name, shape, path)
    weight, mix = tensors[f"{first}.weight"].double(), tensors[f"{_PREPARATION}.weight"].double()[..., 0, 0]
    std, mean = encoder.std.flatten().double(), encoder.mean.flatten().double()
    shift = mix @ mean + tensors[f"{_PREPARATION}.bias"].double()
    folded = dict(tensors)
    folded[f"{first}.weight"] = torch.einsum("omhw,mi->oihw", weight, mix * std)
    folded[f"{first}.bias"] = tensors[f"{first}.bias"].double() + weight.sum(dim=(2, 3)) @ shift
    return folded


def _expect(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], path: str) -> None:
    if name not in tensors:
        raise WeightsError(f"{path}: expected a tensor {name}, found none")
    if tuple(tensors[name].shape) != shape:
        raise WeightsError(
            f"{path}: expected {name} of shape {shape}, found {tuple(tensors[name].shape)}; encoder.widths must be "
            "[64, 128, 256, 512] for the weights of a VGG-19"
        )


@torch.no_grad()
def _seeded(encoder: VGGEncoder, seed: int) -> VGGEncoder:
    """Random filters that keep what they see, each scaled to unit deviation over noise as smooth as pictures are.

    Plain random filters lose colours and places a little more at every layer, and leave a few channels that are silent
    but for outliers, which then rule every loss. So channels are mixed by rotations, which lose nothing; a layer that
    has twice the channels of the one below passes the same once more, negated, so that what a ReLU cuts is kept in
    the other half; in between, ReLUs hardly cut; and before a pooling channels look at places of their own. A tenth
    is random edges.
    """
    generator = torch.Generator().manual_seed(seed)
    x = _smooth_noise(generator)
    x = (x - encoder.mean) / encoder.std
    for index, conv in enumerate(encoder.convs):
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        conv.weight.copy_(_random_edges(conv, generator) * (_EDGE_SHARE if index else 5 * _EDGE_SHARE))
        _pass_on(conv, shift=index + 1 in TAPS, generator=generator)
        nn.init.zeros_(conv.bias)
        if index in TAPS[1:]:
            x = F.max_pool2d(x, 2)
        x = conv(x)
        std, mean = torch.std_mean(x, dim=(0, 2, 3))
        if index not in TAPS:
            mean = mean - 2 * std
        conv.weight.div_(std.view(-1, 1, 1, 1))
        conv.bias.copy_(-mean / std)
        x = F.relu((x - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1))
    return encoder


def _random_edges(conv: nn.Conv2d, generator: torch.Generator) -> Tensor:
    outputs, inputs = conv.weight.shape[:2]
    mixing = torch.randn(outputs, inputs, len(_FILTERS), generator=generator) / inputs**0.5
    return torch.einsum("oik,khw->oihw", mixing, _FILTERS)


def _pass_on(conv: nn.Conv2d, *, shift: bool, generator: torch.Generator) -> None:
    """Add a rotation of the inputs, negated in each second repetition; shifted by up to a pixel if asked."""
    outputs, inputs = conv.weight.shape[:2]
    places = torch.randint(0, 9, (outputs,), generator=generator)
    # Pictures vary in light far more than in colour; opponent colours, as trained networks have them, count as much.
    rotation = _OPPONENTS if inputs == 3 else torch.linalg.qr(torch.randn(inputs, inputs, generator=generator))[0]
    for output in range(outputs):
        repeat, source = divmod(output, inputs)
        y, x = divmod(int(places[output]), 3) if shift else (1, 1)
        conv.weight[output, :, y, x] += rotation[source] * (-1.0) ** repeat


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
        x = (batch.to(encoder.mean.device) - encoder.mean) / encoder.std
        for index, (conv, step) in enumerate(zip(encoder.convs, THEN, strict=True)):
            x = F.relu(conv(x))
            mean = x.mean(dim=(0, 2, 3)) * (len(batch) / sum(map(len, batches)))
            if index == len(means):
                means.append(torch.zeros_like(mean))
            means[index] += mean
            x = F.max_pool2d(x, 2) if step == "pool" else x
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


@torch.no_grad()
def normalisation_of(encoder: VGGEncoder, weights: VGGEncoder) -> Literal["data", "none"] | None:
    """How an encoder was made of weights: `data`, rescaled by `normalise_encoder` over whatever images; `none`, as they
    are; None, not of these. Both have the same widths.
    """

    def alike(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> bool:
        """Within a thousandth: other machines seed with other roundings."""
        return all((a - b).norm() <= 1e-3 * b.norm() for a, b in zip(found, wanted, strict=True))

    if alike(encoder.parameters(), weights.parameters()):
        return "none"
    return "data" if alike(_without_scales(encoder), _without_scales(weights)) else None


def _without_scales(encoder: VGGEncoder) -> list[Tensor]:
    """Weights and bias of each layer with every output channel of norm 1: what no rescaling of channels changes."""
    layers: list[Tensor] = []
    before = torch.ones(3, dtype=torch.float64)
    for conv in encoder.convs:
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        weight = conv.weight.double() * before.view(1, -1, 1, 1)
        layer = torch.cat([weight.flatten(1), conv.bias.double()[:, None]], dim=1)
        before = layer.norm(dim=1).clamp(min=1e-12)
        layers.append(layer / before[:, None])
    return layers


def fingerprint(encoder: VGGEncoder) -> str:
    """sha256 over the weights' bytes: 64 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()
