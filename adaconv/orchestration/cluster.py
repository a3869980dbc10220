"""The cluster a job runs on: the one it was submitted to, or one of its own on this machine."""

import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

from adaconv.errors import AdaConvError, ClusterError
from adaconv.scratch import scratch_folder

log = logging.getLogger(__name__)

# 2 logical CPUs are the least that a pipeline of Ray Data (a reader and a model) or Ray Train (ranks and their
# readers) needs so as not to wait for itself; a laptop's cores are lent twice rather than that.
_MIN_LOGICAL_CPUS = 4


@contextmanager
def connect(*, object_store_mb: int = 256) -> Iterator[None]:
    """Connect to the cluster that RAY_ADDRESS names (inside `ray job submit` it does), else start a local one.

    A local cluster listens with a token that only this process and its workers know, keeps its files in a folder of its
    own, joins no other cluster and ends with the block. Ray reads the token when it is imported, so whatever imports it
    belongs inside the block.

    Raises:
        ClusterError: the cluster cannot be reached, or a local one cannot be started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    address = os.environ.get("RAY_ADDRESS")
    if not address and "RAY_AUTH_MODE" not in os.environ:
        # Left alone, Ray writes a token that everybody can read to the home folder, and later clients without it fail.
        assert "ray" not in sys.modules, "import ray inside `with connect()`, or set RAY_AUTH_MODE first"
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(16)
    if not address:
        # Read on every system, whatever its name says: one node alone, known as 127.0.0.1. Else its servers listen on
        # all of the machine's addresses.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    started = time.monotonic()
    with ExitStack() as ending:
        # Sockets live below this folder and their paths may have 107 characters: keep it short.
        temp_dir = None if address else str(ending.enter_context(scratch_folder("ray", "/tmp")))
        # Before its folder goes, and also where Ctrl-C came while it started; what has not told Ray of itself by then
        # ends with this process.
        ending.callback(ray.shutdown)
        try:
            if address:
                ray.init(log_to_driver=False, logging_level=logging.ERROR)
            else:
                with _groups_of_their_own():
                    ray.init(
                        address="local",
                        num_cpus=max(_MIN_LOGICAL_CPUS, os.cpu_count() or 1),
                        object_store_memory=object_store_mb * 2**20,
                        include_dashboard=False,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                        _temp_dir=temp_dir,
                    )
        except AdaConvError:  # such as a SIGTERM's
            raise
        except Exception as error:  # Ray raises Exception itself where a node does not come up in time
            where = f"the Ray cluster at RAY_ADDRESS={address}" if address else "a local Ray cluster"
            raise ClusterError(f"cannot connect to {where}: {error}; pipelines/doctor.py checks the cluster") from error
        resources = ray.cluster_resources()
        log.info(
            "ray %s | %s | %.0f CPUs, %.0f GPUs, %d nodes | up in %.1f s",
            ray.__version__,
            address or "local cluster",
            resources.get("CPU", 0),
            resources.get("GPU", 0),
            sum(node["Alive"] for node in ray.nodes()),
            time.monotonic() - started,
        )
        yield


@contextmanager
def _groups_of_their_own() -> Iterator[None]:
    """Ray's processes are started in other process groups than this one: `timeout` and shells send SIGTERM to a whole
    group, and a training without its GCS could ask no rank for a checkpoint. They end with this process all the same,
    for that the kernel sees to. There is no setting.
    """
    from ray._private import services

    popen = services.ConsolePopen
    services.ConsolePopen = partial(popen, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = popen


def set_up_ray_data() -> None:
    """Our own status line instead of Ray Data's bars and messages, errors as they were raised, and no second with one
    task at each start.
    """
    import ray.data  # sets its logger up anew
    from ray.data._internal.execution.resource_manager import ResourceManager

    # Its first look at what the cluster has finds nothing, for that is asked for then; until the next one it starts one
    # task, so as not to wait for ever. There is no setting.
    assert hasattr(ResourceManager, "GLOBAL_LIMITS_UPDATE_INTERVAL_S"), f"not an attribute in Ray {ray.__version__}"
    ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S = property(lambda self: 1.0 if self._global_limits.cpu else 0.1)

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what a task or actor raises comes without its trace
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars, context.raise_original_map_exception = False, True


def require_resources(**needed: float) -> None:
    """Refuse now actors that would otherwise wait for ever, or wait for nodes that come when they are asked for.

    Args:
        needed: totals over the cluster, as in `CPU=4, GPU=2`.

    Raises:
        ClusterError: names each resource, how much is needed and how much there is.
    """
    import ray

    def missing() -> str:
        there = ray.cluster_resources()
        short = [
            f"{amount:g} {name} needed, {there.get(name, 0):g} in the cluster"
            for name, amount in needed.items()
            if amount > there.get(name, 0)
        ]
        return f"the job needs more than the cluster has: {'; '.join(short)}" if short else ""

    bundles = [{name: 1.0} for name, amount in needed.items() for _ in range(math.ceil(amount))]
    _wait_for(missing, bundles, "--scaling.num-actors or the resources per actor")


def require_workers(count: int, resources: Mapping[str, float]) -> None:
    """Refuse now a number of workers that would wait for ever: each has its resources on one node.

    Raises:
        ClusterError: says how many workers fit, and on which nodes.
    """
    import ray

    def missing() -> str:
        fit = {}
        for node in ray.nodes():
            if node["Alive"]:
                there = {name: node["Resources"].get(name, 0) for name in resources}
                told = ", ".join(f"{amount:g} {name}" for name, amount in there.items())
                # Fractions of a resource add up with rounding.
                number = min(int(there[name] / amount + 1e-6) for name, amount in resources.items() if amount)
                fit[f"{node['NodeManagerAddress']} ({told})"] = number
        if sum(fit.values()) >= count:
            return ""
        each = ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
        return f"{count} workers of {each} needed, {sum(fit.values())} fit: " + (
            "; ".join(f"{number} on {node}" for node, number in fit.items()) or "there are no nodes"
        )

    _wait_for(missing, [dict(resources)] * count, "--scaling.num-workers or the resources per worker")


def _wait_for(missing: Callable[[], str], bundles: list[dict[str, float]], settings: str) -> None:
    """Until nothing is missing. A cluster that grows with its work has little at first: its autoscaler is asked for the
    bundles, and has ADACONV_CLUSTER_PATIENCE seconds (0). `settings`: what to lower, for whoever waits in vain.
    """
    from ray.autoscaler.sdk import request_resources

    patience = float(os.environ.get("ADACONV_CLUSTER_PATIENCE", "0"))
    deadline, asked = time.monotonic() + patience, False
    while what := missing():
        if time.monotonic() >= deadline:
            raise ClusterError(
                f"{what}. Lower {settings}, or add nodes; where nodes come when they are asked for, set "
                f"ADACONV_CLUSTER_PATIENCE to the seconds that takes ({patience:g} now)"
            )
        if not asked:
            log.info("waiting %g s for nodes: %s", patience, what)
            request_resources(bundles=bundles)
            asked = True
        time.sleep(1)
    if asked:  # the job holds its nodes by itself from here on, and lets them go with its end
        request_resources(bundles=[])
