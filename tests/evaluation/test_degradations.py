"""Models that were spoilt in twenty ways do not take the place of the one they were made of."""

import copy
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from adaconv.checkpoint import ModelInfo
from adaconv.evaluation.gate import compare, judge
from adaconv.evaluation.metrics import METRICS, Judge
from adaconv.evaluation.protocol import read_protocol
from adaconv.evaluation.scores import Evaluation
from adaconv.model.encoder_weights import fingerprint, load_encoder, normalise_encoder
from adaconv.model.network import build_network
from adaconv.stylize.stylizer import Stylizer
from adaconv.training.losses import style_transfer_losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
SIDE, STEPS = 64, 600
MARGINS = dict.fromkeys(METRICS, 0.05)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folders for training and, of other pictures, for judging."""
    from adaconv.data.synthetic import generate_paintings, generate_photos

    root = tmp_path_factory.mktemp("pictures")
    for seed, (use, count) in enumerate({"train": 40, "judge": 20}.items()):
        generate_photos(root / use / "photos", count, seed=seed, size=80)
        generate_paintings(root / use / "paintings", count, seed=seed, size=80)
    return root


def tensors(folder):
    """(n, 3, SIDE, SIDE) in [0, 1]."""
    made = [Image.open(file).convert("RGB").resize((SIDE, SIDE)) for file in sorted(folder.iterdir())]
    return torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) for one in made]).float() / 255


def train(pictures, seed):
    """Two states of a network: after a tenth of the steps, and trained, as conf/train/smoke.yaml trains."""
    contents, styles = (tensors(pictures / "train" / name) for name in ("photos", "paintings"))
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    encoder = load_encoder("seeded:0", widths=(8, 16, 32, 64))
    normalise_encoder(encoder, [torch.cat([contents, styles])])
    net = build_network(encoder=encoder, architecture="adaconv", descriptor_channels=16, groups=(64, 16, 4, 1))
    named = list(net.transfer.named_parameters())
    slow = [parameter for name, parameter in named if name.startswith("style_encoder")]
    rest = [parameter for name, parameter in named if not name.startswith("style_encoder")]
    optimizer = torch.optim.Adam([{"params": rest}, {"params": slow}])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [2e-3, 6e-5], total_steps=STEPS)
    for step in range(STEPS):
        content = contents[torch.randint(len(contents), (4,), generator=generator)]
        style = styles[torch.randint(len(styles), (4,), generator=generator)]
        with torch.no_grad():
            content_features, style_features = encoder.relu4_1(content), encoder(style)
        output = net.transfer(content_features, style_features[-1])
        losses = style_transfer_losses(
            output,
            encoder(output),
            content_features,
            style_features,
            content_weight=0.5,
            style_weight=1.5,
            identity=(net.transfer(content_features, content_features), content),
            identity_weight=1000.0,
        )
        optimizer.zero_grad()
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(net.transfer.parameters(), 1000.0)
        optimizer.step()
        schedule.step()
        if step == STEPS // 10:
            early = copy.deepcopy(net)
    return early.eval(), net.eval()


@pytest.fixture(scope="module")
def judged(pictures, tmp_path_factory):
    """A function: network -> its scores."""
    encoder = load_encoder("seeded:5", widths=(8, 16, 32, 64))  # another one than the models were trained with
    where = [[str(pictures / "judge" / name)] for name in ("photos", "paintings")]
    protocol = read_protocol(*where, contents=20, styles=20, side=SIDE, style_side=SIDE, judge=fingerprint(encoder))
    evaluation = Evaluation(protocol, Judge(encoder), device="cpu", output=str(tmp_path_factory.mktemp("scores")))
    numbers = iter(range(1000))

    def scores(net, then=None):
        info = ModelInfo(digest=f"{next(numbers):016d}", settings={}, encoder_fingerprint="", step=0)
        return evaluation.scores("model", _Spoilt(net, info, then) if then else Stylizer(net, info))

    return scores


class _Spoilt(Stylizer):
    def __init__(self, net, info, then):
        super().__init__(net, info)
        self._then = then

    def stylize_all(self, content, packs, **how):
        yield from (self._then(output, content) for output in super().stylize_all(content, packs, **how))


@pytest.fixture(scope="module")
def trained(pictures):
    return train(pictures, seed=0)


def jpeg(quality):
    def through(output, _):
        buffer = io.BytesIO()
        pixels = (output[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
        return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)[None].float() / 255

    return through


def blurred(output, _):
    return F.avg_pool2d(F.pad(output, (2, 2, 2, 2), mode="reflect"), 5, stride=1)


OF_OUTPUTS = {
    "JPEG of quality 20": jpeg(20),
    "JPEG of quality 5": jpeg(5),
    "red and blue swapped": lambda output, _: output.flip(1),
    "blurred": blurred,
    "noise": lambda output, _: output + 0.1 * torch.randn(output.shape, generator=torch.Generator().manual_seed(0)),
    "darker": lambda output, _: output * 0.7,
    "inverted": lambda output, _: 1 - output,
    "grey": lambda output, _: output.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1),
    "turned": lambda output, _: output.flip(3),
    "shifted by four pixels": lambda output, _: output.roll(4, 3),
    "half of the content": lambda output, content: 0.5 * output + 0.5 * content,
    "the content": lambda output, content: content,
    "few levels": lambda output, _: (output * 4).round() / 4,
}


def _scaled(name, factor):
    def spoil(net):
        for key, parameter in net.transfer.named_parameters():
            if name in key:
                parameter.mul_(factor)

    return spoil


def _last(net):
    return [module for module in net.transfer.modules() if isinstance(module, torch.nn.Conv2d)][-1]


def _no_numbers(net):
    _last(net).bias[0] = float("nan")


def _noise(net):
    generator = torch.Generator().manual_seed(0)
    for parameter in net.transfer.parameters():
        parameter.add_(0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator))


def _other_norm(net):
    net.encoder.mean.add_(0.3)
    net.encoder.std.mul_(2)


def _forgotten_layer(net):
    _last(net).weight.zero_()


OF_WEIGHTS = {
    "a layer of NaN": _no_numbers,
    "noise on the weights": _noise,
    "another normalisation of pictures": _other_norm,
    "a layer of zeros": _forgotten_layer,
    "the style unread": _scaled("style_encoder", 0.0),
    "kernels half as strong": _scaled("predict", 0.5),
}


def test_spoilt_models_stay_out(trained, judged):
    hardly, good = trained
    old = judged(good)
    assert old.defects == ()
    candidates = {"hardly trained": judged(hardly)}
    for name, then in OF_OUTPUTS.items():
        candidates[name] = judged(good, then)
    for name, spoil in OF_WEIGHTS.items():
        net = copy.deepcopy(good)
        with torch.no_grad():
            before = {key: value.clone() for key, value in net.state_dict().items()}
            spoil(net)
        assert any(not torch.equal(value, before[key]) for key, value in net.state_dict().items()), name
        candidates[name] = judged(net)
    assert len(candidates) == 20
    promoted = []
    for name, new in candidates.items():
        comparisons = compare(new.of, old.of, margins=MARGINS)
        verdict = judge(comparisons, require="better", defects=new.defects)
        print(f"{name}: {'PROMOTED' if verdict.promoted else 'kept out'}; {verdict.reasons[:2]}")
        if verdict.promoted:
            promoted.append(name)
    assert set(promoted) <= {"shifted by four pixels"}


def test_more_style_for_less_content_is_another_model_and_no_better_one(trained, judged):
    hardly, good = trained
    new, old = judged(good).of, judged(hardly).of
    verdict = judge(compare(new, old, margins=MARGINS), require="better")
    print("\n".join(str(one) for one in verdict.comparisons))
    assert {reason.split()[0] for reason in verdict.reasons} == {"content", "structure"}
    # Whoever wants that says so.
    wanted = MARGINS | {"content": 1.0, "structure": 1.0}
    assert judge(compare(new, old, margins=wanted), require="better").promoted
