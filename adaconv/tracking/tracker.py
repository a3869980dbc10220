"""What training tells about itself, whoever listens. Metric names are the same everywhere: `train/loss`, `perf/...`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

GRID_KEY = "samples/grid"  # of the pictures that a run's page and its models are shown by
GRID_GAP = 4  # pixels of white between a grid's cells


class Tracker(Protocol):
    """The first rank's view of a run. No method raises for an outage of what is behind it, and none waits for it."""

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """One point of each metric; a step that is told again changes nothing."""

    def image(self, key: str, pixels: NDArray[np.uint8], *, step: int) -> None:
        """A picture of a series: (H, W, 3) uint8 under a key, at a step."""

    def checkpoint(self, uri: str, *, step: int) -> None:
        """A checkpoint was published."""

    def flush(self, *, timeout_seconds: float) -> int:
        """Hand over what is still held; returns how many records are left when the time is up."""


@dataclass
class RecordingTracker:
    """Keeps everything in lists, for tests."""

    points: list[tuple[int, str, float]] = field(default_factory=list)
    images: list[tuple[int, str, NDArray[np.uint8]]] = field(default_factory=list)
    checkpoints: list[tuple[int, str]] = field(default_factory=list)

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        self.points += [(step, name, value) for name, value in values.items()]

    def image(self, key: str, pixels: NDArray[np.uint8], *, step: int) -> None:
        self.images.append((step, key, pixels))

    def checkpoint(self, uri: str, *, step: int) -> None:
        self.checkpoints.append((step, uri))

    def flush(self, *, timeout_seconds: float) -> int:
        return 0

    def series(self, name: str) -> list[tuple[int, float]]:
        return [(step, value) for step, metric, value in self.points if metric == name]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested configuration as dotted names and texts, as MLflow's parameters want it."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = str(value)
    return flat
