"""A checkpoint to graphs that another runtime stylizes with."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from adaconv.model.export import largest_difference
from pipelines import export
from tests.helpers import save_checkpoint


@pytest.mark.filterwarnings("ignore")  # torch's exporter and what it imports warn of their own
def test_graphs_say_what_they_are_of_and_stylize(tmp_path):
    network, uri = save_checkpoint(tmp_path / "checkpoints")
    output = tmp_path / "exported"
    assert export.main(["--model", uri, "--output", str(output), "--style-side", "64"]) == 0
    result = json.loads((output / "result.json").read_text())
    assert result["model"] == uri
    assert 0 <= result["largest_difference"] < 1e-3
    assert {path.name for path in output.iterdir()} == {"style.onnx", "apply.onnx", "result.json"}
    for name in ("style", "apply"):
        told = {prop.key: prop.value for prop in onnx.load(result[name]).metadata_props}
        assert told == {
            "adaconv.model": "step-00000007",  # no path: the files travel
            "adaconv.model_digest": result["model_digest"],
            "adaconv.style_side": "64",
            "adaconv.smallest_side": "16",
        }
    style, apply = (onnxruntime.InferenceSession(result[name]) for name in ("style", "apply"))
    assert [output.name for output in apply.get_outputs()] == ["stylized"]
    assert apply.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    painting, photo = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 50, 70)
    code = dict(
        zip((one.name for one in style.get_outputs()), style.run(None, {"style": painting.numpy()}), strict=True)
    )
    (stylized,) = apply.run(None, {"content": photo.numpy(), **code})
    with torch.no_grad():
        np.testing.assert_allclose(stylized, network(photo, painting).numpy(), atol=5e-4)
    torch.nn.init.constant_(network.transfer.scales[0].convs[0].weight, torch.nan)
    graphs = (Path(result["style"]), Path(result["apply"]))
    assert math.isnan(largest_difference(network, *graphs, style_side=64, shapes=((1, 64, 64), (1, 40, 40))))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_graphs_that_are_not_the_network_are_not_published(tmp_path, monkeypatch, capsys):
    _, uri = save_checkpoint(tmp_path / "checkpoints")
    monkeypatch.setattr(export, "_ADMITTED", -1.0)
    output = tmp_path / "exported"
    assert export.main(["--model", uri, "--output", str(output), "--style-side", "64"]) == 1
    assert {path.name for path in output.iterdir()} == {"result.json"}
    assert "nothing was published" in capsys.readouterr().err


def test_what_is_missing_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert export.main(["--model", str(tmp_path), "--output", str(tmp_path / "exported")]) == 2
    assert "found no onnxscript: pip install 'adaconv[export]'" in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()


def test_both_must_be_given(capsys):
    assert export.main(["--model", "models:/adaconv@champion"]) == 2
    assert "required: --output" in capsys.readouterr().err
