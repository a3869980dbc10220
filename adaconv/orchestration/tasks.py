"""Independent pieces of work as Ray Data tasks: bounded retries, one status line for all, answers as they are ready."""

import logging
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import ray
from ray.data import TaskPoolStrategy

from adaconv.errors import AdaConvError, JobError
from adaconv.orchestration.board import Board
from adaconv.orchestration.cluster import set_up_ray_data
from adaconv.orchestration.metrics import TaskMetrics
from adaconv.progress import Progress, repeatedly

# Of one task; Ray's own default is without end. Whoever may be killed by its input looks out for itself after the first
# death, so what is left are machines and operators.
_WORKER_DEATHS_ADMITTED = 10
_ASK_SECONDS = 2.0

log = logging.getLogger(__name__)


def run_tasks(
    function: Callable[..., dict[str, Any]],
    jobs: Sequence[dict[str, Any]],
    *,
    what: str,
    images: int,
    done: int = 0,
    num_workers: int | None = None,
    **shared: Any,
) -> Generator[dict[str, Any], None, None]:
    """One Ray Data task a job; answers come as they are ready, and status lines say how far it is.

    Args:
        function: (job, board, **shared) -> a small answer. Of a module, so that workers import it.
        jobs: small; data travels through storage.
        what: the status line's first word.
        images: that all the work is about.
        done: images that were done before.
        num_workers: tasks at once; None is as many as the cluster has CPUs.
        shared: what every job is handed besides.

    Raises:
        AdaConvError, OSError: what a task raised.
        JobError: a task lost its worker time and again.
    """
    progress = Progress(what, total=images, done=done)
    if not jobs:
        progress.close()
        return
    set_up_ray_data()
    # One a driver, for it takes a process: what runs next clears it.
    board = ray.remote(Board).options(name="board", get_if_exists=True, num_cpus=0, max_restarts=-1).remote()
    board.clear.remote()
    dataset = ray.data.from_items(list(jobs), override_num_blocks=len(jobs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there is no other way yet to bound the retries
        mapped = dataset.map(
            _with_plain_errors,
            fn_kwargs={"function": function, "board": board, **shared},
            num_cpus=1,
            compute=TaskPoolStrategy(size=num_workers and min(num_workers, len(jobs))),
            max_retries=_WORKER_DEATHS_ADMITTED,
        )
    with _watched(progress, board, TaskMetrics(what)):
        try:
            yield from mapped.iter_rows()
        except ray.exceptions.RayTaskError as error:
            raise_cause(error)
        except ray.exceptions.WorkerCrashedError as error:
            raise JobError(
                f"a task lost its worker {_WORKER_DEATHS_ADMITTED + 1} times; look for memory that ran out or nodes "
                "that went away. The same command goes on where this stopped"
            ) from error


def _with_plain_errors(
    job: dict[str, Any], *, function: Callable[..., dict[str, Any]], **shared: Any
) -> dict[str, Any]:
    with plain_errors():
        return function(job, **shared)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Around what Ray Data calls, which adds its advice to an error's arguments: an OSError's third is its path."""
    try:
        yield
    except OSError as error:
        if error.strerror is None:
            raise
        raise type(error)(error.strerror + (f": {error.filename}" if error.filename else "")) from error


def raise_cause(error: ray.exceptions.RayTaskError) -> NoReturn:
    """Raise what a task of Ray Data raised, if it is for the user, without Ray's trace and its advice."""
    if isinstance(error.cause, (AdaConvError, OSError)):
        message, _, _ = str(error.cause).partition("\nFailed to apply UDF transform")
        raise type(error.cause)(message) from None
    raise error


@contextmanager
def _watched(progress: Progress, board: ray.actor.ActorHandle, metrics: TaskMetrics) -> Iterator[None]:
    """Carry the board's totals to the status line and the metrics, and a last time at the end."""
    began, told = time.monotonic(), 0

    def look() -> None:
        nonlocal told
        try:
            images, read_bytes, refused = ray.get(board.totals.remote(), timeout=10)
        except ray.exceptions.RayError:  # the board was lost and comes back empty: a line less, no more
            return
        megabytes = read_bytes / 1e6 / (time.monotonic() - began)
        forward = max(0, images - told)
        told += forward
        metrics.advance(forward, refused=refused)
        progress.advance(forward, **{"MB/s": f"{megabytes:.1f}", "quarantined": refused})

    try:
        with repeatedly(look, seconds=_ASK_SECONDS):
            yield
    finally:
        look()
        progress.close()
