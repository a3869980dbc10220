"""How a row is measured: ours and a baseline alternate, medians count, and a floor says what is left.

A floor is arithmetic or bytes divided by what this machine just did at its best: matrix products, copies.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

_GPU_SECONDS, _GPU_CALLS = 0.1, 100


@dataclass(frozen=True)
class Row:
    """Seconds of one unit of work. `ratio`: how many times as fast as the baseline. `of_floor`: 1 is the limit.

    `against` says what the baseline is. `flops` and `bytes_moved` are what the work takes at least, and the floor's
    reasons; peaks are of each side's process, and of its GPU's memory where it has one.
    """

    name: str
    ours: float
    baseline: float
    floor: float
    unit: str
    against: str = ""
    flops: float | None = None
    bytes_moved: float | None = None
    ours_peak_bytes: int | None = None
    baseline_peak_bytes: int | None = None

    @property
    def ratio(self) -> float:
        return self.baseline / self.ours

    @property
    def of_floor(self) -> float:
        return self.floor / self.ours

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "of_floor": self.of_floor}


@dataclass(frozen=True)
class Side:
    """One side of a row, in a process of its own: its allocator and its peak of memory are its own.

    `make(**options)` is called once there, and what it returns is measured; both must be picklable. `environment` is
    what the process starts with, besides what this one has.
    """

    make: Callable[..., Callable[[], Any]]
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Taken:
    """Median seconds of a round, and the process's largest memory."""

    seconds: float
    peak_bytes: int


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Seconds(float):
    """What a work returns that has a clock of its own."""


def alternate(*works: Callable[[], Any], rounds: int) -> list[float]:
    """Median seconds of each, run in turns after one unmeasured round: load of other programs falls on all.

    Args:
        works: one that returns Seconds is taken at its word.
        rounds: that are measured.
    """
    return _in_turns([partial(_seconds, work) for work in works], rounds)


def alternate_processes(ours: Side, baseline: Side, *, rounds: int) -> tuple[Taken, Taken]:
    """The same for two sides in processes of their own, which live side by side; one waits while the other works."""
    peaks = [0, 0]

    def once(number: int, ask: Callable[[], tuple[float, int]]) -> float:
        seconds, peaks[number] = ask()
        return seconds

    with _process(ours) as ask_ours, _process(baseline) as ask_baseline:
        seconds = _in_turns([lambda: once(0, ask_ours), lambda: once(1, ask_baseline)], rounds)
    return Taken(seconds[0], peaks[0]), Taken(seconds[1], peaks[1])


def _in_turns(rounds_of: list[Callable[[], float]], rounds: int) -> list[float]:
    for once in rounds_of:
        once()
    taken = [[once() for once in rounds_of] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*taken, strict=True)]


@contextlib.contextmanager
def _process(side: Side) -> Iterator[Callable[[], tuple[float, int]]]:
    """Asked, it does one round and answers with its seconds and the process's peak of memory so far."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_answer, args=(there, side), daemon=True)
    with environment_of_children(side.environment):
        process.start()
    there.close()

    def ask() -> tuple[float, int]:
        try:
            here.send(True)
            seconds, peak = here.recv()
        except (EOFError, ConnectionError):
            process.join()
            raise RuntimeError(f"{side} ended with {process.exitcode}; its error is above") from None
        return seconds, peak

    try:
        yield ask
    finally:
        here.close()
        process.join(timeout=10)
        process.kill()


def _answer(connection: Connection, side: Side) -> None:
    work = side.make(**side.options)
    with contextlib.suppress(EOFError):
        while connection.recv():
            seconds = _seconds(work)
            connection.send((seconds, _peak_bytes()))


@contextlib.contextmanager
def environment_of_children(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Not getrusage: a process's largest memory there begins with that of the one it was started from.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _seconds(work: Callable[[], Any]) -> float:
    """Of one call; on a GPU, where a call may end before its work, the mean of as many as a tenth of a second holds."""
    calls, began = 0, _now()
    while True:
        own = work()
        if isinstance(own, Seconds):
            return own
        calls += 1
        if not torch.cuda.is_available() or time.perf_counter() - began > _GPU_SECONDS or calls == _GPU_CALLS:
            return (_now() - began) / calls


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def floor_seconds(flops: float, bytes_moved: float, dtype: torch.dtype = torch.float32) -> float:
    """Of work that computes and moves this much, with the two overlapping as they best do."""
    return max(flops / peak_flops(dtype), bytes_moved / copy_bytes())


@cache
def peak_flops(dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a large matrix product here and now."""
    side = 8192 if torch.cuda.is_available() else 1024
    a, b = torch.randn(2, side, side, device=device()).to(dtype)
    return 2 * side**3 / _best(lambda: a @ b)


@cache
def copy_bytes() -> float:
    """Bytes/s, read and written together, of a copy too large for caches."""
    # Written once: all pages that never were are the same one, which a cache holds.
    source = torch.ones(2**28 if torch.cuda.is_available() else 2**26, device=device())
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _best(lambda: target.copy_(source))


def as_recorded(work: Callable[[], Any]) -> Callable[[], Any]:
    """The same as training runs it: on a GPU from a CUDA graph, so that Python's share is not measured."""
    if not torch.cuda.is_available():
        return work
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _best(function: Callable[[], Any]) -> float:
    return min(_seconds(function) for _ in range(8))
