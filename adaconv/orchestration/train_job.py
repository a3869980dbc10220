"""The training loop on Ray Train: ranks, failures, and a way to stop.

Checkpoints are the project's own (adaconv/checkpoint.py), not Ray's: published whole or not at all, and found again by
a new group of ranks of any size, which starts from the newest one. A group that lost a rank is simply started again.
"""

import contextlib
import logging
import math
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from adaconv import allocator, checkpoint, storage
from adaconv.config.train import TrainConfig
from adaconv.data.loader import is_lost_worker
from adaconv.data.manifest import open_version
from adaconv.errors import AdaConvError, JobError, of_storage
from adaconv.orchestration.cluster import require_workers
from adaconv.orchestration.metrics import MeteredTracker
from adaconv.progress import repeatedly
from adaconv.tracking.tracker import Tracker
from adaconv.training.distributed import barrier
from adaconv.training.loop import Word, train

log = logging.getLogger(__name__)

_POLL_SECONDS, _RESIZE_SECONDS = 1.0, 30.0
_NOTICED_SAVE_SECONDS = 3.0  # and the time that one takes is what a node that was given notice can lose
# What gloo and NCCL say, as plain RuntimeErrors, when somebody else died.
_LOST_PEER = ("Connection closed by peer", "Connection reset", "gloo", "NCCL")


class _Desk:
    """Where the driver and the ranks leave word for one another; an actor."""

    def __init__(self, max_restarts: int) -> None:
        self._max_restarts = max_restarts
        self._stop, self._lines = False, list[str]()
        self._error: tuple[str, int | None] | None = None
        self._node_of_rank = dict[int, str]()
        self._starts_in_vain, self._furthest, self._ranks = 0, -1, 0
        self._trouble: str | None = None  # of this start
        self._trouble_before: str | None = None

    def request_stop(self) -> None:
        self._stop = True

    def word(self) -> tuple[bool, float | None]:
        """Whether to stop; and when a node of the ranks is to go, if one is: seconds since 1970, infinite if open."""
        # Not ray.train.get_preemption_info: it is a barrier of all ranks, too slow to ask at every step.
        draining: dict[str, int] = {}
        with contextlib.suppress(Exception):
            draining = ray._private.state.state.get_draining_nodes()  # to milliseconds, 0 if open
        nodes = {node for rank, node in self._node_of_rank.items() if rank < self._ranks}
        ends = [draining[node] / 1000 or math.inf for node in nodes & draining.keys()]
        return self._stop, min(ends, default=None)

    def start(self, node: str, rank: int, ranks: int) -> None:
        """A rank begins. Until a newer checkpoint is found the start is in vain, unless there are more ranks than
        before: then the cluster grew, and nothing was lost.
        """
        self._node_of_rank[rank] = node
        if rank == 0:
            self._starts_in_vain += ranks <= self._ranks
            self._ranks, self._trouble_before, self._trouble = ranks, self._trouble, None

    def found(self, newest_step: int) -> None:
        """The first rank goes on from the checkpoint of this step; too many starts in vain end the run."""
        if newest_step > max(self._furthest, 0):
            self._starts_in_vain = 0
        self._furthest = max(self._furthest, newest_step)
        self._give_up_in_the_end()

    def published(self, step: int) -> None:
        """A new checkpoint is there, so the next start follows one that was not in vain."""
        self._starts_in_vain, self._furthest = -1, max(step, self._furthest)

    def lost(self, trouble: str) -> None:
        """A rank ends for what may be better the next time. The first to say so in a start knows best why."""
        if not self._trouble:
            self._trouble = trouble
            self.say(f"WARNING a rank ends: {trouble}")
        self._give_up_in_the_end()

    def _give_up_in_the_end(self) -> None:
        if self._starts_in_vain <= self._max_restarts:
            return
        trouble = self._trouble or self._trouble_before
        since = f"checkpoint after step {self._furthest}" if self._furthest >= 0 else "new checkpoint"
        why = (
            f"The last one ended with: {trouble}"
            if trouble
            else "A rank was lost each time, to the system's memory limit, a lost node or a signal: see the log of the "
            "cluster. Checkpoints more often (checkpoint.every_steps) lose less"
        )
        self.fail(
            f"training was given up: {self._max_restarts} restarts in a row (scaling.max_restarts) brought no "
            f"{since}; the same command goes on from the newest one. {why}",
            1,
        )

    def say(self, line: str) -> None:
        self._lines.append(line)

    def take_lines(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines

    def fail(self, message: str, exit_code: int | None) -> None:
        self._error = self._error or (message, exit_code)

    def error(self) -> tuple[str, int | None] | None:
        return self._error


class _DeskControl:
    """The first rank's side of the desk. A thread asks, so that a step never waits for an answer."""

    def __init__(self, desk: Any) -> None:
        self._desk, self._stop = desk, False
        self._node_ends: float | None = None
        self._save_from, self._saving = 0.0, False
        threading.Thread(target=self._ask, name="desk", daemon=True).start()

    def word(self) -> Word:
        """While a node of the ranks has notice, `checkpoint` again and again, but not before the last one is there."""
        if self._stop:
            return "stop"
        if self._node_ends is None or self._saving or time.monotonic() < self._save_from:
            return "go"
        self._saving, self._save_from = True, time.monotonic() + _NOTICED_SAVE_SECONDS
        return "checkpoint"

    def say(self, line: str) -> None:
        self._desk.say.remote(line)

    def published(self, step: int) -> None:
        self._saving = False
        self._desk.published.remote(step)

    def not_published(self) -> None:
        self._saving = False

    def _ask(self) -> None:
        while not self._stop:
            before = self._node_ends
            with contextlib.suppress(ray.exceptions.RayError):
                self._stop, self._node_ends = ray.get(self._desk.word.remote())
            if self._node_ends is not None and before is None:
                when = f"in {self._node_ends - time.time():.0f} s" if math.isfinite(self._node_ends) else "soon"
                self.say(f"a node goes {when}: a checkpoint every {_NOTICED_SAVE_SECONDS:.0f} s until then")
            time.sleep(_POLL_SECONDS)


def run_train_job(config: TrainConfig, *, run_folder: str, tracker: Tracker, meta: dict[str, Any]) -> dict[str, Any]:
    """Train on the connected cluster until the last step, or until SIGTERM or Ctrl-C asks for a checkpoint and an end.

    Args:
        config: resolved; its paths are absolute.
        run_folder: of the run; its checkpoints go to `checkpoints/` there.
        tracker: travels to the first rank.
        meta: kept with every checkpoint.

    Returns:
        step, checkpoint, finished, losses.

    Raises:
        ClusterError: the cluster has not what the ranks need.
        AdaConvError: what a rank raised: bad data, a loss that is not finite, a checkpoint of another run.
        JobError: a rank failed with an unexpected error, or restarts brought nothing, `scaling.max_restarts` in a row.
    """
    scaling = config.scaling
    resources = {"CPU": scaling.cpus_per_worker}
    if scaling.gpus_per_worker:
        resources["GPU"] = scaling.gpus_per_worker
    require_workers(scaling.least_workers, resources)
    # Beside the driver, which is lost with it anyway: a desk on another node would be one more thing to lose.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Should its process die all the same, calls wait for the next one, which counts anew.
    lasting = {"max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    desk = ray.remote(_Desk).options(num_cpus=0, **lasting).remote(scaling.max_restarts)
    trainer = _Trainer(
        desk,
        _train_rank,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "checkpoints": storage.join(run_folder, "checkpoints"),
            "tracker": tracker,
            "meta": meta,
            "desk": desk,
        },
        scaling_config=ScalingConfig(
            num_workers=scaling.num_workers,
            elastic_resize_monitor_interval_s=_RESIZE_SECONDS,
            use_gpu=scaling.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        torch_config=TorchConfig(backend="nccl" if scaling.gpus_per_worker else "gloo"),
        run_config=RunConfig(
            # Notes of Ray's own, a new folder for each start; none of them is needed to go on.
            name=f"start-{int(time.time())}-{os.getpid()}",
            storage_path=storage.join(run_folder, "ray"),
            worker_runtime_env={} if scaling.gpus_per_worker else {"env_vars": allocator.environment()},
            # How often is enough is for the desk to say, which knows whether a restart got any further.
            failure_config=FailureConfig(max_failures=-1, controller_failure_limit=3),
        ),
    )
    log.info("starting %d ranks", scaling.most_workers)
    with _sigterm_requests_stop(desk), _lines_of(desk), _ctrl_c_interrupts():
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            _raise_what_a_rank_left(desk)
            require_workers(scaling.least_workers, resources)
            raise JobError(
                f"training was given up: {_last_line(error)}; the same command goes on from the newest checkpoint"
            ) from error
    _raise_what_a_rank_left(desk)
    return dict(result.return_value)


def _train_rank(job: dict[str, Any]) -> dict[str, Any]:
    """What each rank runs; Ray has set up the process group.

    An error in code or data would be the same the second time. It is left at the desk; where Ray starts the ranks
    again, they find it there and end at once.
    """
    desk, context = job["desk"], ray.train.get_context()
    first_rank = context.get_world_rank() == 0
    node = ray.get_runtime_context().get_node_id()
    ray.get(desk.start.remote(node, context.get_world_rank(), context.get_world_size()))
    try:
        if first_rank and ray.get(desk.error.remote()) is None:
            ray.get(desk.found.remote(max(checkpoint.steps_in(job["checkpoints"]), default=0)))
        barrier(ray.train.torch.get_device())  # the first rank's word, which may be that this was one start too many
        if ray.get(desk.error.remote()) is not None:
            return {}
        return _train(job, desk, first_rank)
    except Exception as error:
        if not _is_infrastructure(error):
            ray.get(desk.fail.remote(*_told(error)))
        elif is_lost_worker(error) or not _is_lost_peer(error):  # whose own rank knows why
            ray.get(desk.lost.remote(f"{type(error).__name__}: {error}"))
        raise


def _train(job: dict[str, Any], desk: Any, first_rank: bool) -> dict[str, Any]:
    logging.basicConfig(level=logging.WARNING)
    config, tracker = TrainConfig.model_validate(job["config"]), job["tracker"]
    _use_threads(config)
    try:
        result = train(
            config,
            content=open_version(config.content),
            style=open_version(config.style),
            checkpoints=job["checkpoints"],
            device=ray.train.torch.get_device(),
            tracker=MeteredTracker(tracker) if first_rank else tracker,
            control=_DeskControl(desk) if first_rank else None,  # its word is all ranks' word
            start_from=None if config.resume in ("auto", "none") else config.resume,
            meta=job["meta"],
        )
        return asdict(result)
    finally:
        if first_rank:
            tracker.flush(timeout_seconds=30)


def _is_infrastructure(error: Exception) -> bool:
    """Whether another attempt may go better: a peer, a process or a connection was lost."""
    if isinstance(error, AdaConvError):
        return False
    if isinstance(error, (ConnectionError, TimeoutError, ray.exceptions.RayError)):
        return True
    return _is_lost_peer(error) or is_lost_worker(error)


def _is_lost_peer(error: Exception) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST_PEER)


def _told(error: Exception) -> tuple[str, int | None]:
    """What the driver says of an error, and its exit code; a defect has none, and tells its traceback."""
    if isinstance(error, AdaConvError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        return of_storage(error), AdaConvError.exit_code
    return "".join(traceback.format_exception(error)), None


def _raise_what_a_rank_left(desk: Any) -> None:
    left = ray.get(desk.error.remote())
    if left is not None:
        message, exit_code = left
        error = AdaConvError(message) if exit_code is not None else JobError(f"a rank failed:\n{message}")
        error.exit_code = exit_code or 1
        raise error


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray's, but that the first Ctrl-C asks for a checkpoint; the second aborts the ranks, as Ray has it."""

    def __init__(self, desk: Any, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self._desk = desk

    def _register_sigint_handler(self, controller: Any) -> None:
        super()._register_sigint_handler(controller)
        abort = signal.getsignal(signal.SIGINT)
        assert callable(abort)

        def request(_signal: int, _frame: object) -> None:
            signal.signal(signal.SIGINT, abort)
            log.info("Ctrl-C: asking the ranks for a checkpoint; once more ends them at once")
            self._desk.request_stop.remote()

        signal.signal(signal.SIGINT, request)


@contextlib.contextmanager
def _sigterm_requests_stop(desk: Any) -> Iterator[None]:
    """SIGTERM, which `ray job stop` and schedulers send, leads to a checkpoint."""

    def request(_signal: int, _frame: object) -> None:
        log.info("SIGTERM: asking the ranks for a checkpoint")
        desk.request_stop.remote()

    before = signal.signal(signal.SIGTERM, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _ctrl_c_interrupts() -> Iterator[None]:
    """Ray takes Ctrl-C for itself: it aborts the ranks and ends the driver as if something had asked for its exit."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _lines_of(desk: Any) -> Iterator[None]:
    """Log what the first rank says, without the noise of every worker's output."""

    def take() -> None:
        for line in ray.get(desk.take_lines.remote()):
            log.info(line)

    try:
        with repeatedly(take, seconds=_POLL_SECONDS):
            yield
    finally:
        take()


def _use_threads(config: TrainConfig) -> None:
    """Ray gives a task of one CPU one thread; on CPUs the ranks share the machine's cores instead."""
    threads = config.scaling.threads_per_worker
    if threads is None and not config.scaling.gpus_per_worker:
        threads = max(1, (os.cpu_count() or 1) // ray.train.get_context().get_local_world_size())
    if threads:
        torch.set_num_threads(threads)
