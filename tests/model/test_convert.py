"""A network built as a public implementation builds it, and ours with its weights: one function."""

import pytest
import torch
from torch import nn

from adaconv.errors import WeightsError
from adaconv.model.convert import network_from_relbers
from bench.peers import RElbersAdaConv

SMALL = {"widths": (8, 16, 32, 64), "descriptor_channels": 16}


def relbers(**sizes):
    """With weights of He's deviation: torch's own die away on the long way of the style, and all outputs are alike."""
    torch.manual_seed(0)
    network = RElbersAdaConv(**sizes).eval()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
    return network


def images(height, width, seed, count=1):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sizes", [SMALL, {}], ids=["small", "full width"])
@torch.no_grad()
def test_relbers_weights_give_relbers_outputs(sizes):
    theirs = relbers(**sizes)
    content, style = images(64, 96, 1), images(256, 256, 2)
    last = theirs.decoder.layers[-1]
    for weight in last.parameters():
        weight.div_(4 * theirs(content, style).std())  # outputs vary as much as images do
    wanted = theirs(content, style)
    assert wanted.std() > 0.1
    assert (wanted - theirs(content, style.square())).std() > 0.05
    torch.testing.assert_close(network_from_relbers(theirs.state_dict())(content, style), wanted, rtol=0, atol=1e-4)


def test_each_relbers_weight_counts():
    """Another value of any one weight is another output: none is left where it was drawn."""
    state = relbers(**SMALL).state_dict()
    converted = network_from_relbers(state).state_dict()
    for name in state:
        changed = network_from_relbers({**state, name: state[name] + 1}).state_dict()
        different = [our for our in converted if not torch.equal(converted[our], changed[our])]
        assert len(different) == 1, name
        assert torch.equal(changed[different[0]], state[name] + 1)


def test_the_names_of_relbers_trainer_are_known():
    state = relbers(**SMALL).state_dict()
    prefixed = network_from_relbers({f"model.{name}": value for name, value in state.items()}).state_dict()
    for name, value in network_from_relbers(state).state_dict().items():
        assert torch.equal(prefixed[name], value)


def test_weights_of_another_network_are_refused_by_name():
    state = relbers(**SMALL).state_dict()
    with pytest.raises(WeightsError, match=r"found unknown decoder\.layers\.99\.weight"):
        network_from_relbers({**state, "decoder.layers.99.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"do not fit one another.*linear\.weight"):
        network_from_relbers({**state, "style_encoder.fc.weight": torch.zeros(3, 3)})
    del state["style_encoder.fc.bias"]
    with pytest.raises(WeightsError, match=r"found no style_encoder\.fc\.bias"):
        network_from_relbers(state)
