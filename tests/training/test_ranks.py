"""Two ways of averaging gradients over ranks: beside the backward pass by DDP, and at once behind it."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from adaconv.config.model import LossConfig
from adaconv.config.train import OptimConfig
from adaconv.model.encoder_weights import load_encoder
from adaconv.model.network import build_network
from adaconv.training.state import make_state
from adaconv.training.step import train_step

SHARES = (3, 2)  # pairs of each rank


def updates(store, rank, device, **how):
    """Losses of three updates of this rank's share, and the weights after them. Ranks begin with their own weights."""
    torch.manual_seed(rank)
    network = build_network(
        encoder=load_encoder("seeded:0", widths=(4, 8, 8, 16)), descriptor_channels=8, groups=(16, 4, 2, 1)
    )
    optim = OptimConfig(global_batch_size=sum(SHARES), micro_batch_size=how.pop("micro", None))
    state = make_state(network, optim, device=torch.device(device))
    dist.init_process_group("gloo", store=dist.FileStore(str(store), len(SHARES)), rank=rank, world_size=len(SHARES))
    state = replace(state, **how)  # for its ranks were not there
    images = torch.randint(0, 256, (3, 2, sum(SHARES), 3, 48, 48), generator=torch.Generator().manual_seed(0))
    mine = slice(sum(SHARES[:rank]), sum(SHARES[: rank + 1]))
    norms = []
    for content, style in images.to(torch.uint8):
        batch = SimpleNamespace(content=content[mine], style=style[mine], content_keys=[], style_keys=[])
        norms.append(train_step(state, batch, optim=optim, loss=LossConfig()).gradient_norm)
    return norms, [p.detach().cpu() for p in network.transfer.parameters()]


def _rank(rank, folder, device, ways):
    torch.set_num_threads(1)
    for number, how in enumerate(ways):
        torch.save(updates(folder / f"store-{number}", rank, device, **how), folder / f"{number}-{rank}.pt")
        dist.destroy_process_group()
    os._exit(0)  # gloo's threads may abort an interpreter that ends in order


def by_ranks(folder, device, *ways):
    """For each way what each rank found."""
    mp.spawn(_rank, args=(folder, device, ways), nprocs=len(SHARES))
    return [[torch.load(folder / f"{number}-{rank}.pt") for rank in range(len(SHARES))] for number in range(len(ways))]


def test_at_once_is_what_ddp_does(tmp_path):
    """To the bit: two numbers have one sum. With micro-batches as well."""
    ways = ({}, {"at_once": True}, {"micro": 2}, {"at_once": True, "micro": 2})
    ddp, at_once, ddp_in_parts, at_once_in_parts = by_ranks(tmp_path, "cpu", *ways)
    for wanted, found in ((ddp, at_once), (ddp_in_parts, at_once_in_parts)):
        for (wanted_norms, wanted_weights), (norms, weights) in zip(wanted, found, strict=True):
            assert norms == wanted_norms
            assert all(torch.equal(a, b) for a, b in zip(weights, wanted_weights, strict=True))
    (norms, first), (other_norms, second) = at_once
    assert norms == other_norms
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_may_travel_in_bfloat16(tmp_path):
    whole, halved = by_ranks(tmp_path, "cpu", {"at_once": True}, {"at_once": True, "gradient_compression": "bfloat16"})
    (norms, _), (rounded, first), (_, second) = whole[0], *halved
    assert rounded[0] == pytest.approx(norms[0], rel=1e-3)
    assert rounded != norms
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ranks_on_a_gpu_record_what_ddp_does(tmp_path):
    """Two of them on one, by gloo, which takes what lies there through the CPU."""
    ddp, recorded = by_ranks(tmp_path, "cuda", {}, {"at_once": True})
    for (wanted_norms, wanted_weights), (norms, weights) in zip(ddp, recorded, strict=True):
        assert norms == pytest.approx(wanted_norms, rel=1e-3)
        assert all(torch.allclose(a, b, rtol=1e-2, atol=1e-3) for a, b in zip(weights, wanted_weights, strict=True))
