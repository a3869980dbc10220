"""How the machine of the first rank is doing, as MLflow's own monitors see it, told like any other metric.

MLflow's thread would write to the server by itself: lost in an outage, and with steps that begin anew at each restart.
"""

import logging
import threading
from collections.abc import Callable

from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

log = logging.getLogger(__name__)


class SystemMetrics:
    """Samples from a thread and hands `system/...` values to `tell`, until it is stopped."""

    def __init__(self, tell: Callable[[dict[str, float]], None], *, interval_seconds: float = 10.0) -> None:
        self._tell, self._interval_seconds = tell, interval_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        try:
            monitors.append(GPUMonitor())
        except (ImportError, RuntimeError) as error:  # no nvidia-ml-py, or no driver: the way of machines without a GPU
            import torch  # not above: who reads runs imports this module too, and can do without

            if torch.cuda.is_available():
                log.warning("tracking: there is a GPU, but no metrics of it: %s", error)
        while not self._stop.wait(self._interval_seconds):
            values: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                values.update({f"system/{name}": float(v) for name, v in monitor.aggregate_metrics().items()})
                monitor.clear_metrics()
            self._tell(values)
