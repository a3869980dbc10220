"""Does the structure of a style reach the output? AdaConv and AdaIN, trained alike on your images, under turned styles.

A painting and the same painting turned by 90 degrees have the same colours, and nearly the same means and deviations of
features. What differs in the outputs for both is structure. Two numbers, over held-out contents and the styles that
have the clearest direction:

    change    |difference of the outputs' orientation histograms|, summed over bins: 0 (none) to 2
    follow    that difference, projected on the styles' own: 1 if outputs turn as far as the styles do

python bench/structure.py --contents photos/ --styles paintings/ --encoder imagenet --steps 160000 --side 256
python bench/structure.py --contents photos/ --styles paintings/ --small --steps 2000     minutes on two cores
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from adaconv import allocator
from adaconv.errors import AdaConvError
from adaconv.images import EXTENSIONS, ImageError, decode, to_rgb
from adaconv.model.encoder import VGGEncoder
from adaconv.model.encoder_weights import load_encoder, normalise_encoder
from adaconv.model.network import StyleTransferNet, build_network
from adaconv.progress import Progress
from adaconv.training.losses import style_transfer_losses
from bench.measure import device

_HELD_OUT = 100  # of contents, and of styles
_CONTENTS, _STYLES = 16, 12  # of those, that are measured
_BINS = 12
_SMALL = (16, 32, 64, 128)  # channels, a quarter of VGG-19's


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contents", type=Path, required=True, help="images in any folders below it")
    parser.add_argument("--styles", type=Path, required=True, help="images in any folders below it")
    parser.add_argument("--limit", type=int, default=5000, help="of each, evenly; they are held in memory")
    parser.add_argument("--encoder", default="seeded:0", help="as encoder.weights; then normalised on both folders")
    parser.add_argument("--small", action="store_true", help="a quarter of the paper's channels; with a seeded encoder")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--side", type=int, default=96, help="of the crops that are trained on, in pixels")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--style-weight", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.limit < 2 * _HELD_OUT:
        parser.error(f"--limit: expected {2 * _HELD_OUT} or more, found {options.limit}")
    try:
        return compare(options)
    except AdaConvError as error:
        parser.error(str(error))


def compare(options: argparse.Namespace) -> int:
    """A line of JSON for each network."""
    allocator.keep()
    contents, styles = (
        _read(folder, options.side * 5 // 3, options.limit) for folder in (options.contents, options.styles)
    )
    encoder = load_encoder(options.encoder, **({"widths": _SMALL} if options.small else {}))
    normalise_encoder(encoder, [_as_float(torch.cat([contents[:32], styles[:32]]))])
    encoder.to(device())
    for architecture in ("adaconv", "adain"):
        began = time.monotonic()
        network, losses = train(architecture, encoder, contents[:-_HELD_OUT], styles[:-_HELD_OUT], options)
        measured = measure(network, contents[-_HELD_OUT:], styles[-_HELD_OUT:])
        seconds = round(time.monotonic() - began)
        print(json.dumps({"architecture": architecture, **measured, **losses, "seconds": seconds}), flush=True)
    return 0


def train(
    architecture: Any, encoder: VGGEncoder, contents: Tensor, styles: Tensor, options: argparse.Namespace
) -> tuple[StyleTransferNet, dict[str, float]]:
    """The network after steps on random crops, of styles turned at random; and the mean losses of the last tenth."""
    torch.manual_seed(options.seed)
    draw = torch.Generator().manual_seed(options.seed)
    sizes = {} if architecture == "adain" else _sizes(encoder.widths)
    network = build_network(encoder=encoder, architecture=architecture, **sizes).to(device())
    optimizer = torch.optim.Adam(_parameters(network, options.learning_rate))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=options.steps)
    last: list[dict[str, float]] = []
    told = partial(print, file=sys.stderr, flush=True)
    progress = Progress(architecture, total=options.steps, unit="steps", emit=told)
    for step in range(options.steps):
        content = _crops(contents, options.batch, options.side, draw)
        style = _crops(styles, options.batch, options.side, draw)
        turns = torch.randint(0, 4, (options.batch,), generator=draw).tolist()
        style = torch.stack([image.rot90(turn, (1, 2)) for image, turn in zip(style, turns, strict=True)])
        with torch.no_grad():
            content_features, style_features = encoder.relu4_1(content), encoder(style)
        output = network.transfer(content_features, style_features[-1])
        losses = style_transfer_losses(
            output,
            encoder(output),
            content_features,
            style_features,
            content_weight=1.0,
            style_weight=options.style_weight,
        )
        optimizer.zero_grad()
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.transfer.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        if step >= options.steps * 9 // 10:
            last.append({name: loss.item() for name, loss in losses.items()})
        progress.advance(1)
    progress.close()
    return network, {name: round(float(np.mean([one[name] for one in last])), 3) for name in last[0]}


@torch.no_grad()
def measure(network: StyleTransferNet, contents: Tensor, styles: Tensor) -> dict[str, float]:
    """`change` and `follow`, means over all pairs of the first contents and the styles of the clearest direction."""
    content, all_styles = (_as_float(images).to(device()) for images in (contents[:_CONTENTS], styles))
    of_style = orientations(all_styles)
    of_turned = orientations(all_styles.rot90(1, (2, 3)))
    clearest = (of_style - of_turned).abs().sum(dim=1).argsort(descending=True)[:_STYLES]
    change, follow = [], []
    for number in clearest.tolist():
        style = all_styles[number]
        outputs = [
            network(content, image.expand(len(content), -1, -1, -1)) for image in (style, style.rot90(1, (1, 2)))
        ]
        along, turned = (orientations(output.clamp(0, 1)) for output in outputs)
        wanted = of_style[number] - of_turned[number]
        change.append((along - turned).abs().sum(dim=1).mean().item())
        follow.append((((along - turned) @ wanted) / (wanted @ wanted)).mean().item())
    return {"change": round(float(np.mean(change)), 4), "follow": round(float(np.mean(follow)), 4)}


def orientations(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, bins): share of the gradients' magnitude by direction, which has no sign."""
    grey = F.avg_pool2d(images.mean(dim=1, keepdim=True), 3, stride=1)[:, 0]  # less of the pixels' grid
    across, down = grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2], grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]
    angle = torch.atan2(down, across) % torch.pi
    bins = (angle / torch.pi * _BINS).long().clamp(max=_BINS - 1)
    strength = torch.hypot(across, down)
    sums = strength.new_zeros(len(images), _BINS).scatter_add_(1, bins.flatten(1), strength.flatten(1))
    return sums / sums.sum(dim=1, keepdim=True).clamp(min=1e-9)


def _sizes(widths: tuple[int, int, int, int]) -> dict[str, Any]:
    """The paper's groups and descriptor at these widths."""
    one, two, three, four = widths
    return {"descriptor_channels": four, "groups": (four, three // 2, two // 4, one // 8)}


def _parameters(network: StyleTransferNet, rate: float) -> list[dict[str, Any]]:
    """The style encoder learns at a tenth: see train.style_encoder_rate."""
    named = list(network.transfer.named_parameters())
    slow = [parameter for name, parameter in named if name.startswith("style_encoder")]
    rest = [parameter for name, parameter in named if not name.startswith("style_encoder")]
    return [{"params": rest, "lr": rate}, *([{"params": slow, "lr": rate / 10}] if slow else [])]


def _read(folder: Path, side: int, limit: int) -> Tensor:
    """(N, 3, side, side) uint8: the middle of every image, its shorter side scaled."""
    pictures = []
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    count = min(limit, len(paths))
    for path in (paths[number * len(paths) // count] for number in range(count)):
        try:
            image = to_rgb(decode(path.read_bytes()))
        except ImageError:
            continue
        scale = side / min(image.size)
        image = image.resize(
            (max(side, round(image.width * scale)), max(side, round(image.height * scale))), Image.Resampling.BICUBIC
        )
        left, top = (image.width - side) // 2, (image.height - side) // 2
        pictures.append(torch.from_numpy(np.array(image.crop((left, top, left + side, top + side)))).permute(2, 0, 1))
    if len(pictures) < 2 * _HELD_OUT:
        raise SystemExit(f"{folder}: expected {2 * _HELD_OUT} images or more, found {len(pictures)}")
    return torch.stack(pictures)


def _crops(images: Tensor, count: int, side: int, draw: torch.Generator) -> Tensor:
    room = images.shape[-1] - side + 1
    crops = []
    for number in torch.randint(0, len(images), (count,), generator=draw).tolist():
        top, left = torch.randint(0, room, (2,), generator=draw).tolist()
        crops.append(images[number, :, top : top + side, left : left + side])
    return _as_float(torch.stack(crops)).to(device())


def _as_float(images: Tensor) -> Tensor:
    return images.float() / 255


if __name__ == "__main__":
    sys.exit(main())
