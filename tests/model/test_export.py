"""The two graphs compute what the network computes, in another runtime."""

import onnxruntime
import pytest
import torch

from adaconv.model.encoder_weights import load_encoder
from adaconv.model.export import export_onnx
from adaconv.model.network import build_network


@pytest.mark.filterwarnings("ignore")  # the exporter and what it imports warn of their own
@pytest.mark.parametrize("architecture", ["adaconv", "adain"])
def test_two_graphs_compute_what_the_network_does(architecture, tmp_path):
    """A style once, then contents of several sizes with its code."""
    torch.manual_seed(0)
    encoder = load_encoder("seeded:0", widths=(4, 8, 8, 16))
    net = build_network(encoder=encoder, architecture=architecture, descriptor_channels=8, groups=(16, 4, 2, 1)).eval()
    of_style, of_content = (
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for path in export_onnx(net, tmp_path / "graphs", style_side=64)
    )
    style = torch.rand(1, 3, 64, 64)
    names = [output.name for output in of_style.get_outputs()]
    code = dict(zip(names, of_style.run(None, {"style": style.numpy()}), strict=True))
    for size in ((64, 96), (32, 40), (128, 72)):
        content = torch.rand(1, 3, *size)
        (found,) = of_content.run(None, {"content": content.numpy(), **code})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), net(content, style), rtol=1e-4, atol=1e-4)
