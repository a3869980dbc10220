"""The two graphs compute what the network computes, in another runtime."""

import pytest
import torch

from adaconv.model.encoder_weights import load_encoder
from adaconv.model.export import export_onnx, largest_difference, smallest_side
from adaconv.model.network import build_network

SIZES = ((64, 96), (40, 51), (99, 128), (16, 16), (17, 200))


@pytest.mark.slow  # tests/pipelines/test_export.py has a few of these sizes
@pytest.mark.filterwarnings("ignore")  # the exporter and what it imports warn of their own
@pytest.mark.parametrize(("architecture", "batches"), [("adaconv", (1, 2, 5)), ("adain", (1, 3))])
def test_two_graphs_compute_what_the_network_does(architecture, batches, tmp_path):
    """For contents of any size and batches of any number; they were traced with others."""
    torch.manual_seed(0)
    encoder = load_encoder("seeded:0", widths=(4, 8, 8, 16))
    net = build_network(encoder=encoder, architecture=architecture, descriptor_channels=8, groups=(16, 4, 2, 1)).eval()
    graphs = export_onnx(net, tmp_path / "graphs", style_side=64)
    shapes = [(batch, *size) for size in SIZES for batch in batches]
    assert largest_difference(net, *graphs, style_side=64, shapes=shapes) < 5e-4  # an eighth of one of 255 levels
    torch.nn.init.normal_(net.transfer.scales[0].convs[0].weight)
    assert largest_difference(net, *graphs, style_side=64, shapes=shapes[:1]) > 1e-3  # they hold their own weights
    assert smallest_side(net) == 16


def test_larger_kernels_need_larger_contents():
    encoder = load_encoder("seeded:0", widths=(4, 8, 8, 16))
    net = build_network(encoder=encoder, descriptor_channels=8, groups=(16, 4, 2, 1), kernel_size=7, descriptor_size=7)
    assert smallest_side(net) == 32
