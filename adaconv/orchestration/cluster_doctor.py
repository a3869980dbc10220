"""`doctor --cluster`: every node of the cluster, asked from within: the same software, room, storage, tracking."""

import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from adaconv.orchestration.doctor import Finding, storage_error

# What must not differ: pickles, bytes of shards and of weights depend on it.
_PACKAGES = ("adaconv", "ray", "torch", "numpy", "pillow", "simplejpeg", "pyarrow", "mlflow")
_LEAST_DISK_GB, _MOST_CLOCK_SECONDS, _PATIENCE_SECONDS = 10.0, 5.0, 60.0


@dataclass(frozen=True)
class NodeReport:
    """One node, as a task on it found it. Errors are texts; empty where all is well."""

    host: str
    address: str
    software: dict[str, str]
    clock: float
    asked: float
    disk_free_gb: float
    gpus: tuple[str, ...]
    gpus_promised: float
    storage_error: str
    tracking_error: str


def reports(*, output: str, tracking_uri: str | None) -> Iterator[NodeReport | tuple[str, str]]:
    """A report of each living node of the connected cluster, or its address and why there is none.

    Args:
        output: where jobs are to write; every node tries.
        tracking_uri: that jobs would use; None, or a local file, is not tried.
    """
    probe = ray.remote(num_cpus=0, max_retries=0)(_look)
    asked = {}
    for node in ray.nodes():
        if node["Alive"]:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            gpus = node["Resources"].get("GPU", 0.0)
            task = probe.options(scheduling_strategy=here).remote(output, tracking_uri, gpus, time.time())
            asked[task] = node["NodeManagerAddress"]
    ray.wait(list(asked), num_returns=len(asked), timeout=_PATIENCE_SECONDS)
    for task, address in asked.items():
        try:
            yield ray.get(task, timeout=0.1)
        except ray.exceptions.RayError as error:
            yield address, str(error).strip().splitlines()[-1]


def _look(output: str, tracking_uri: str | None, gpus_promised: float, asked: float) -> NodeReport:
    clock = time.time()
    return NodeReport(
        host=socket.gethostname(),
        address=ray.util.get_node_ip_address(),
        software={"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        clock=clock,
        asked=asked,
        disk_free_gb=shutil.disk_usage(tempfile.gettempdir()).free / 1e9,
        gpus=_gpus(),
        gpus_promised=gpus_promised,
        storage_error=storage_error(output),
        tracking_error=_try_tracking(tracking_uri),
    )


def _gpus() -> tuple[str, ...]:
    """Ray hides GPUs from a task that asked for none; the driver's own list is what is there."""
    try:
        return tuple(sorted(os.listdir("/proc/driver/nvidia/gpus")))
    except OSError:
        return ()


def _try_tracking(uri: str | None) -> str:
    from adaconv.tracking.runs import ping

    if not uri or not uri.startswith("http"):
        return ""
    try:
        ping(uri)
    except Exception as error:  # whatever a server can answer
        return str(error)
    return ""


def judged(found: Sequence[NodeReport | tuple[str, str]], *, now: float) -> Iterator[Finding]:
    """Findings for each node and then for the cluster.

    Args:
        found: what `reports` gave.
        now: the driver's clock when the last of them came.
    """
    nodes = [report for report in found if isinstance(report, NodeReport)]
    for lost in (report for report in found if not isinstance(report, NodeReport)):
        what = f"node {lost[0]} does not answer: {lost[1]}"
        yield Finding("FAIL", what, "see its logs; a node that hangs is best restarted")
    usual = _usual([node.software for node in nodes])
    for node in nodes:
        name = f"node {node.address} ({node.host})"
        different = [
            f"{package} {node.software.get(package)} (elsewhere {usual[package]})"
            for package in usual
            if node.software.get(package) != usual[package]
        ]
        problems: list[Finding] = []
        if different:
            what = f"{name} has other software: {', '.join(different)}"
            problems.append(Finding("FAIL", what, "give all nodes one image"))
        if node.storage_error:
            what = f"{name} cannot use the output: {node.storage_error}"
            problems.append(Finding("FAIL", what, "see credentials, mounts"))
        if node.tracking_error:
            what = f"{name}: {node.tracking_error}"
            problems.append(Finding("FAIL", what, "see MLFLOW_TRACKING_* in the nodes' environment"))
        if node.gpus_promised > len(node.gpus):
            what = f"{name} promises {node.gpus_promised:g} GPUs and has {len(node.gpus)}"
            problems.append(Finding("FAIL", what, "see the driver and the container's runtime"))
        if node.disk_free_gb < _LEAST_DISK_GB:
            what = f"{name} has {node.disk_free_gb:.1f} GB free for temporary files"
            problems.append(Finding("note", what, "shards are cached and objects spilled there"))
        if not node.asked - _MOST_CLOCK_SECONDS <= node.clock <= now + _MOST_CLOCK_SECONDS:
            what = f"{name}: its clock is off by seconds"
            problems.append(Finding("note", what, "S3 refuses requests when it is minutes"))
        yield from problems or [Finding("ok", f"{name}: {node.disk_free_gb:.0f} GB free, {len(node.gpus)} GPUs")]
    if len(nodes) == len(found) and nodes:
        versions = f"Python {usual['python']}, torch {usual['torch']}, Ray {usual['ray']}"
        yield Finding("ok", f"{len(nodes)} nodes answer; {versions}")


def _usual(software: list[dict[str, str]]) -> dict[str, str]:
    """Of each package, the version that most nodes have."""
    names = sorted({name for one in software for name in one})
    versions: dict[str, list[Any]] = {name: [one.get(name) for one in software] for name in names}
    return {name: max(sorted(set(given)), key=given.count) for name, given in versions.items()}
