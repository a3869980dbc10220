"""One update in bfloat16 against the same in float32; what the options may change and what not."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from adaconv.config.model import LossConfig
from adaconv.config.train import OptimConfig
from adaconv.model.encoder_weights import load_encoder
from adaconv.model.network import build_network
from adaconv.training.state import make_state
from adaconv.training.step import train_step
from tests.servers import REPO

# Widths as in conf/train/smoke.yaml: bfloat16 keeps three digits, and sums of few values show it most.
WIDTHS, MODEL = (8, 16, 32, 64), {"descriptor_channels": 16, "groups": (64, 16, 4, 1)}


def update(**options):
    """Losses and gradient norm of the first update, and the losses that the second finds."""
    torch.manual_seed(0)
    network = build_network(encoder=load_encoder("seeded:0", widths=WIDTHS), **MODEL)
    optim = OptimConfig(global_batch_size=4, clip_norm=None, **options)
    state = make_state(network, optim, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    content, style = torch.randint(0, 256, (2, 4, 3, 64, 64), dtype=torch.uint8, generator=generator)
    batch = SimpleNamespace(content=content, style=style, content_keys=[], style_keys=[])
    first, second = (train_step(state, batch, optim=optim, loss=LossConfig()) for _ in range(2))
    values = {f"first {name}": value.item() for name, value in first.losses.items()}
    values |= {f"second {name}": value.item() for name, value in second.losses.items()}
    assert all(p.dtype == torch.float32 for p in network.parameters())
    return values | {"norm": first.gradient_norm}


@pytest.fixture(scope="module")
def float32():
    return update(channels_last=False)


def test_channels_last_changes_nothing_but_rounding(float32):
    found = update(channels_last=True)
    # Adam makes a whole step of any gradient, so the second update differs more; so do gradients by themselves, whose
    # convolutions oneDNN does on some processors by algorithms that round more (1.4e-4 from float64, its others 2e-5).
    for name, value in found.items():
        assert value == pytest.approx(float32[name], rel=1e-4 if "first" in name else 1e-3), name


def test_bfloat16_loses_no_more_than_its_digits(float32):
    found = update(precision="bfloat16")
    assert found == pytest.approx(float32, rel=2e-2)
    assert found != pytest.approx(float32, rel=1e-6)  # it was bfloat16


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(("precision", "first", "second"), [("float32", 1e-4, 1e-3), ("bfloat16", 2e-2, 2e-2)])
def test_a_compiled_network_changes_nothing_but_rounding(float32, precision, first, second):
    found = update(compile=True, precision=precision)
    for name, value in found.items():
        assert value == pytest.approx(float32[name], rel=first if "first" in name else second), name


@torch.inference_mode()
def test_a_picture_stylized_in_bfloat16_is_float32s_up_to_its_digits():
    torch.manual_seed(0)
    network = build_network(encoder=load_encoder("seeded:0", widths=WIDTHS), **MODEL).eval()
    content, style = F.interpolate(torch.rand(2, 3, 8, 8), size=(64, 64), mode="bilinear").split(1)
    wanted = network(content, style)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(content, style).float()
    assert wanted.std() > 0.05
    difference = (found - wanted).square().mean().sqrt()  # in the image's [0, 1]
    assert 1e-4 < difference < 2e-2


def test_the_compiler_is_not_imported_before_it_is_asked_for():
    """It takes every rank ten seconds to start with."""
    code = "import sys, adaconv.training.step; print('torch._inductor' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
