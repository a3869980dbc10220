"""A step that was recorded as a CUDA graph is the step."""

from types import SimpleNamespace

import pytest
import torch

from adaconv.model.encoder import VGGEncoder
from adaconv.model.network import build_network
from adaconv.training.state import make_state
from adaconv.training.step import train_step
from bench.train_step import LOSS, OPTIM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def updates(*, cuda_graph, identity_weight):
    """Losses of four updates with two batches by turns, and the weights after them."""
    torch.manual_seed(0)
    network = build_network(encoder=VGGEncoder(widths=(16, 32, 32, 64)), descriptor_channels=16, groups=(64, 16, 8, 4))
    optim = SimpleNamespace(**{**OPTIM, "cuda_graph": cuda_graph}, precision="bfloat16", global_batch_size=4)
    state = make_state(network, optim, device=torch.device("cuda"))
    loss, losses = SimpleNamespace(**{**LOSS, "identity_weight": identity_weight}), []
    images = torch.randint(0, 256, (2, 2, 4, 3, 64, 64), dtype=torch.uint8)
    for step in range(4):
        content, style = images[step % 2]
        batch = SimpleNamespace(content=content, style=style, content_keys=[], style_keys=[])
        result = train_step(state, batch, optim=optim, loss=loss)
        losses.append({name: value.item() for name, value in result.losses.items()})
    assert bool(state.recorded) == cuda_graph
    return losses, list(network.transfer.parameters())


@pytest.mark.parametrize("identity_weight", [0.0, 1.0])
def test_a_recorded_step_is_the_same_to_the_bit(identity_weight):
    losses, weights = updates(cuda_graph=True, identity_weight=identity_weight)
    wanted_losses, wanted_weights = updates(cuda_graph=False, identity_weight=identity_weight)
    assert losses == wanted_losses
    assert all(torch.equal(a, b) for a, b in zip(weights, wanted_weights, strict=True))
