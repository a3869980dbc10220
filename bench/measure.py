"""How a row is measured: ours and a baseline alternate in one process, medians count, and a floor says what is left.

A floor is arithmetic or bytes divided by what this machine just did at its best: matrix products, copies.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """Seconds of one unit of work. `ratio`: how many times as fast as the baseline. `of_floor`: 1 is the limit."""

    name: str
    ours: float
    baseline: float
    floor: float
    unit: str

    @property
    def ratio(self) -> float:
        return self.baseline / self.ours

    @property
    def of_floor(self) -> float:
        return self.floor / self.ours

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "of_floor": self.of_floor}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def alternate(ours: Callable[[], Any], baseline: Callable[[], Any], *, rounds: int) -> tuple[float, float]:
    """Median seconds of both, run in turns after one unmeasured round: load of other programs falls on both."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for function, taken in zip((ours, baseline), seconds, strict=True):
            began = _now()
            function()
            if number:
                taken.append(_now() - began)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@cache
def peak_flops(dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a large matrix product here and now."""
    side = 8192 if torch.cuda.is_available() else 1024
    a, b = torch.randn(2, side, side, device=device()).to(dtype)
    return 2 * side**3 / _best(lambda: a @ b)


@cache
def copy_bytes() -> float:
    """Bytes/s, read and written together, of a copy too large for caches."""
    source = torch.empty(2**28 if torch.cuda.is_available() else 2**26, device=device())
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _best(lambda: target.copy_(source))


def _best(function: Callable[[], Any]) -> float:
    taken = []
    for _ in range(8):
        began = _now()
        function()
        taken.append(_now() - began)
    return min(taken)
