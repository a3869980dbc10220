"""What telling a run costs a training step, against the same step untold: its slowest hundredth, and processor time.

A tracker as training has it: eleven metrics every ten steps through the spool to SQLite in the same process, which is
the most that handing over can disturb a step, and system metrics. Two processes take turns, so load of other programs
falls on both; what is left of a turn is handed over before the other's begins.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adaconv import allocator
from adaconv.model.work import Size
from bench.measure import Row, environment_of_children
from bench.train_step import our_step

_SIZE, _BATCH = Size("adaconv", (8, 16, 32, 64), 16, 64), 2
_STEPS, _TOLD_EVERY, _METRICS = 100, 10, 11


def rows(quick: bool) -> Iterable[Row]:
    with tempfile.TemporaryDirectory(prefix="adaconv-bench-") as folder:
        told, untold = _in_turns(Path(folder), rounds=2 if quick else 20)
    steps = f"of {len(told.seconds)} steps of {_BATCH} at {_SIZE.side} px"
    for name, ours, baseline, unit in (
        ("step_p99", np.percentile(told.seconds, 99), np.percentile(untold.seconds, 99), f"slowest hundredth {steps}"),
        ("step_cpu", told.cpu_seconds, untold.cpu_seconds, f"processor time a step, mean {steps}"),
    ):
        yield Row(f"tracking/{name}", float(ours), float(baseline), float(baseline), unit, "the same steps, untold")


@dataclass
class _Taken:
    """Wall seconds of each step; processor seconds of a step in the mean, of all threads and with handing over."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0


def _in_turns(folder: Path, *, rounds: int) -> tuple[_Taken, _Taken]:
    context = multiprocessing.get_context("spawn")
    connections, processes, both = [], [], (_Taken(), _Taken())
    with environment_of_children(allocator.environment()):
        for told in (True, False):
            here, there = multiprocessing.Pipe()
            process = context.Process(target=_answer, args=(there, folder if told else None), daemon=True)
            process.start()
            connections.append(here)
            there.close()  # so that a process that dies is heard of
            processes.append(process)
    for number in range(rounds + 1):
        for taken, connection in zip(both, connections, strict=True):
            connection.send(True)
            seconds, cpu_seconds = connection.recv()
            if number:  # the first round warms up
                taken.seconds += seconds
                taken.cpu_seconds += cpu_seconds / (rounds * _STEPS)
    for connection, process in zip(connections, processes, strict=True):
        connection.send(False)
        process.join()
    return both


def _answer(connection: Connection, folder: Path | None) -> None:
    torch.set_num_threads(1)
    step = our_step(size=_SIZE, batch=_BATCH, precision="float32", compiled=False)
    tracker: Any = None
    if folder is not None:
        from adaconv.tracking.mlflow_tracker import close_run, open_run

        tracker = open_run(
            uri=f"sqlite:///{folder / 'mlflow.db'}",
            experiment="bench",
            identity="run",
            name="run",
            params={},
            tags={},
            datasets={},
            config_yaml="",
            spool_directory=folder / "run" / "spool",
        )
    number = 0
    while connection.recv():
        taken, cpu_before = [], time.process_time()
        for _ in range(_STEPS):
            began = time.perf_counter()
            step()
            number += 1
            if tracker is not None and number % _TOLD_EVERY == 0:
                tracker.metrics({f"train/metric_{k}": 1 / number for k in range(_METRICS)}, step=number)
            taken.append(time.perf_counter() - began)
        if tracker is not None:
            tracker.flush(timeout_seconds=30)
        connection.send((taken, time.process_time() - cpu_before))
    if tracker is not None:
        close_run(tracker, "FINISHED")
