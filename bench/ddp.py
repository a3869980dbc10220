"""A training step on two ranks of one core each: against one rank of one core, at small width.

ddp   twice the pairs by two ranks in the time that one rank takes for its own: a ratio of 2 would be perfect
"""

import os
import socket
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from adaconv import allocator
from adaconv.model import work
from adaconv.model.work import Size
from adaconv.training.state import make_state
from adaconv.training.step import train_step
from bench.measure import Row, environment_of_children, floor_seconds
from bench.sizes import network_of
from bench.train_step import LOSS, OPTIM

_PAIRS = 4  # of a rank


def rows(quick: bool) -> list[Row]:
    size = Size(widths=(16, 32, 64, 128), descriptor_channels=64, side=64 if quick else 128)
    rounds = 1 if quick else 5
    one, two = [], []
    for _ in range(rounds):  # in turns, so that load of other programs falls on both
        one.append(_seconds_of(1, size, steps=2 if quick else 12))
        two.append(_seconds_of(2, size, steps=2 if quick else 12))
    torch.set_num_threads(1)
    flops = _PAIRS * work.train_flops(size)
    per_pair = {1: sorted(one)[rounds // 2] / _PAIRS, 2: sorted(two)[rounds // 2] / (2 * _PAIRS)}
    return [
        Row(
            "ddp",
            ours=per_pair[2],
            baseline=per_pair[1],
            floor=floor_seconds(flops, 0) / (2 * _PAIRS),
            unit=f"a pair at {size.side} px, widths {size.widths}, {_PAIRS} pairs a rank",
            against="one rank; both have one core a rank, gloo",
            flops=flops / _PAIRS,
        )
    ]


def _seconds_of(ranks: int, size: Size, steps: int) -> float:
    """Median seconds of a step on so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "seconds"
        with environment_of_children(allocator.environment()):
            mp.spawn(  # type: ignore[no-untyped-call,attr-defined]
                _rank, args=(ranks, _free_port(), str(answer), size, steps), nprocs=ranks
            )
        return float(answer.read_text())


def _rank(rank: int, ranks: int, port: int, answer: str, size: Size, steps: int) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    network = network_of(size)
    optim: Any = SimpleNamespace(**OPTIM, precision="float32", global_batch_size=ranks * _PAIRS)
    loss: Any = SimpleNamespace(**LOSS)
    state = make_state(network, optim, device=torch.device("cpu"))
    content, style = torch.randint(0, 256, (2, _PAIRS, 3, size.side, size.side), dtype=torch.uint8)
    batch: Any = SimpleNamespace(content=content, style=style, content_keys=[], style_keys=[])
    taken = []
    for _ in range(steps):
        began = time.perf_counter()
        train_step(state, batch, optim=optim, loss=loss)
        taken.append(time.perf_counter() - began)
    if rank == 0:
        Path(answer).write_text(str(sorted(taken[1:])[len(taken[1:]) // 2]))
    if ranks > 1:
        dist.barrier()
    os._exit(0)  # gloo's threads may abort an interpreter that ends in order


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
