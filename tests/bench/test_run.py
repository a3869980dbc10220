"""That the measurements run and say what they should; never how fast."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from adaconv.config.model import LossConfig
from adaconv.config.train import OptimConfig
from adaconv.model import work
from adaconv.model.encoder import VGGEncoder
from adaconv.model.network import build_network
from adaconv.training.losses import style_transfer_losses
from bench import run, train_step
from bench.sizes import size_of


def measure(folder, *names):
    assert run.main([*names, "--quick", "--json", str(folder / "rows.json")]) == 0
    return json.loads((folder / "rows.json").read_text())["rows"]


def test_rows_have_a_ratio_and_a_distance_to_the_floor(tmp_path):
    rows = measure(tmp_path, "load/one_image", "=adaptive_conv/forward")
    assert [row["name"] for row in rows] == ["adaptive_conv/forward", "load/one_image"]
    for row in rows:
        assert row["ratio"] == row["baseline"] / row["ours"] > 0
        assert row["of_floor"] == row["floor"] / row["ours"] > 0


@pytest.mark.slow
def test_rows_of_two_processes_say_what_the_baseline_is_and_their_peaks(tmp_path):
    names = ["train_step/bf16/same_allocator", "stylize/cached/256/fp32"]
    rows = measure(tmp_path, *("=" + name for name in names))
    assert [row["name"] for row in rows] == names
    for row in rows:
        assert row["ratio"] > 0
        assert row["flops"] > 0
        assert row["bytes_moved"] > 0
        assert min(row["ours_peak_bytes"], row["baseline_peak_bytes"]) > 2**26
        assert "RElbers' AdaConv" in row["against"]
    assert "freed memory kept" in rows[0]["against"]


def test_a_side_that_fails_ends_the_measurement():
    from bench.measure import Side, alternate_processes

    fine, broken = Side(sum, {"iterable": ()}), Side(dict, {"a": 1})  # what is made must be callable; neither is
    with pytest.raises(RuntimeError, match="ended with 1"):
        alternate_processes(fine, broken, rounds=1)


def test_rows_are_listed_and_unknown_ones_refused(capsys):
    assert run.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == list(run.QUESTIONS)
    with pytest.raises(SystemExit) as exit_:
        run.main(["nothing"])
    assert exit_.value.code == 2


def test_steps_are_measured_with_the_defaults_that_runs_have():
    own = {
        "precision",
        "global_batch_size",
        "seed",
        "log_every_steps",
        "ledger",
    }  # a row's, or of no meaning for one step
    assert OptimConfig().model_dump(exclude=own) == train_step.OPTIM
    assert LossConfig().model_dump() == train_step.LOSS


def test_torch_and_numpy_are_all_that_the_network_needs_to_be_measured():
    program = (
        "import sys, bench.train_step, bench.stylize, bench.stylize_tiled, bench.adaptive_conv; print(*sys.modules)"
    )
    root = Path(__file__).parents[2]
    loaded = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, check=True, text=True)
    others = {"ray", "mlflow", "webdataset", "s3fs", "fsspec", "pydantic", "tyro", "PIL", "pyarrow", "safetensors"}
    assert not others & set(loaded.stdout.split())


@pytest.mark.parametrize(
    ("architecture", "other"),
    [
        ("adaconv", {}),
        ("adaconv", {"kernel_size": 5, "descriptor_size": 5, "decoder_convs": (2, 3, 1, 2)}),
        ("adaconv", {"descriptor_size": 5, "predictor_padding": "valid"}),
        ("adain", {}),
        ("adain", {"decoder_convs": (1, 1, 1, 1)}),
    ],
)
def test_counted_flops_are_those_that_torch_counts(architecture, other):
    size = dataclasses.replace(size_of(architecture, quick=True), **other)
    network = build_network(
        encoder=VGGEncoder(widths=size.widths),
        architecture=architecture,
        descriptor_channels=size.descriptor_channels,
        groups=size.groups,
        **other,
    )
    side = 128
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        features = network.transfer.predict(network.encoder.relu4_1(torch.rand(1, 3, 256, 256)))
    style = work.encoder_flops(size, 256) + work.style_flops(dataclasses.replace(size, side=256))
    assert counted.get_total_flops() == style
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        network.stylize(torch.rand(1, 3, side, side), features)
    adaptive = work.adaptive_flops(size, side)
    fixed = work.stylize_flops(size, side, style_cached=True) - adaptive
    # Composing the kernels, and whatever way the adaptive convolution takes, is not counted.
    assert fixed <= counted.get_total_flops() <= fixed + 1.34 * adaptive


@pytest.mark.parametrize("decoder_convs", [(1, 4, 2, 2), (1, 1, 1, 1)])
def test_counted_flops_of_training_are_those_that_torch_counts(decoder_convs):
    """Of AdaIN: torch counts grouped convolutions' gradients as if they were not grouped."""
    size = dataclasses.replace(size_of("adain", quick=True), decoder_convs=decoder_convs)
    network = build_network(
        encoder=VGGEncoder(widths=size.widths), architecture="adain", decoder_convs=size.decoder_convs
    )
    content, style = torch.rand(2, 1, 3, size.side, size.side)
    with FlopCounterMode(display=False) as counted:
        features, styles = network.encoder.relu4_1(content), network.encoder(style)
        output = network.transfer(features, styles[-1])
        losses = style_transfer_losses(
            output, network.encoder(output), features, styles, content_weight=1, style_weight=1
        )
        losses["loss"].backward()
    assert counted.get_total_flops() == work.train_flops(size)
    with FlopCounterMode(display=False) as more:
        network.transfer(features, features).sum().backward()
    assert counted.get_total_flops() + more.get_total_flops() == work.train_flops(size, identity=True)


def test_a_works_own_clock_counts_and_what_else_it_returns_does_not():
    from bench.measure import Seconds, alternate

    told, timed = alternate(lambda: Seconds(1000), lambda: 1000.0, rounds=1)
    assert told == 1000
    assert 0 < timed < 100
