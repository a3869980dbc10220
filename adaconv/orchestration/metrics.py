"""What the jobs count for Prometheus, through Ray's own exporter on every node. `ray_` goes before each name.

Labels are few and have few values: a series is kept for every combination of them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.util.metrics import Counter, Gauge

from adaconv.tracking.tracker import Tracker

# Gauges that follow a metric of training.
_TRAIN = {
    "train/loss": ("adaconv_train_loss", "Loss, mean over the ranks since the last point."),
    "perf/images_per_second": ("adaconv_train_images_per_second", "Contents trained on a second, over all ranks."),
    "perf/step_seconds": ("adaconv_train_step_seconds", "Seconds an optimizer step takes."),
    "data/wait_share": ("adaconv_train_data_wait_share", "Share of the time that the first rank waits for data, 0-1."),
}


class MeteredTracker:
    """A tracker that also tells Prometheus; lives where the first rank does."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._step = Gauge("adaconv_train_step", "Optimizer steps done by the run.")
        self._saved = Gauge("adaconv_train_checkpoint_step", "Step of the newest checkpoint.")
        self._gauges = {name: Gauge(*described) for name, described in _TRAIN.items()}

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        self._step.set(step)
        for name, gauge in self._gauges.items():
            if name in values:
                gauge.set(values[name])
        self._tracker.metrics(values, step=step)

    def image(self, key: str, pixels: NDArray[np.uint8], *, step: int) -> None:
        self._tracker.image(key, pixels, step=step)

    def checkpoint(self, uri: str, *, step: int) -> None:
        self._saved.set(step)
        self._tracker.checkpoint(uri, step=step)

    def flush(self, *, timeout_seconds: float) -> int:
        return self._tracker.flush(timeout_seconds=timeout_seconds)


class TaskMetrics:
    """Of a driver whose tasks go through images."""

    def __init__(self, what: str) -> None:
        labels: dict[str, Any] = {"tag_keys": ("stage",)}
        self._images = Counter("adaconv_images", "Images gone through, by stage.", **labels)
        self._refused = Gauge("adaconv_images_quarantined", "Images refused by the running stage.", **labels)
        for metric in (self._images, self._refused):
            metric.set_default_tags({"stage": what})

    def advance(self, images: int, *, refused: int) -> None:
        if images > 0:  # a counter takes nothing less
            self._images.inc(images)
        self._refused.set(refused)


def output_counter() -> Counter:
    """Of stylized pairs, by what became of them: done, skipped, failed."""
    return Counter("adaconv_outputs", "Stylized pairs, by state.", tag_keys=("state",))
