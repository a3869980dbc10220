"""A training as the tracking sees it, without a network: a driver, and a rank that is started again where it died.

Both are processes of their own, forked from one that has imported everything, so that many of them take little time.
"""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np

from adaconv.tracking.mlflow_tracker import close_run, open_run

CHECKPOINT_EVERY, IMAGE_EVERY, METRICS, STEP_SECONDS = 40, 50, 11, 0.01


def drive(root: Path, name: str, uri: str, steps: int) -> None:
    """Ends with 0; with 143 after SIGTERM; with 1 where the rank died four times."""
    # Outages of seconds are to be longer than the client's retries.
    os.environ |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1"}
    folder = root / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stop").unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: (folder / "stop").touch())
    tracker = open_run(
        uri=uri,
        experiment="faults",
        identity=name,
        name=name,
        params={"train": {"steps": steps}},
        tags={"adaconv.folder": str(folder)},
        datasets={"content": ("/data@v1", "c" * 64)},
        config_yaml=f"steps: {steps}\n",
        spool_directory=folder / "spool",
    )
    for _ in range(4):
        rank = multiprocessing.get_context("fork").Process(target=train, args=(tracker, folder, steps))
        rank.start()
        rank.join()
        if rank.exitcode in (0, 143):
            close_run(tracker, "FINISHED" if rank.exitcode == 0 else "KILLED")
            os._exit(rank.exitcode)
    close_run(tracker, "FAILED", error=f"the rank ended with {rank.exitcode}")
    os._exit(1)


def train(tracker, folder: Path, steps: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    newest = folder / "newest"
    step = int(newest.read_text()) if newest.exists() else 0
    if step == 0:
        tracker.image("samples/grid", np.zeros((8, 8, 3), np.uint8), step=0)
    while step < steps and not (folder / "stop").exists():
        step += 1
        time.sleep(STEP_SECONDS)
        names = ["train/loss", *(f"train/metric_{number}" for number in range(METRICS - 1))]
        tracker.metrics(dict.fromkeys(names, 1 / step), step=step)
        if step % IMAGE_EVERY == 0:
            tracker.image("samples/grid", np.zeros((8, 8, 3), np.uint8), step=step)
        if step % CHECKPOINT_EVERY == 0:
            _keep(newest, step)
            tracker.checkpoint(f"{folder}/checkpoints/step-{step:08d}", step=step)
    _keep(newest, step)
    tracker.flush(timeout_seconds=30)
    tracker.close()
    os._exit(0 if step == steps else 143)


def _keep(newest: Path, step: int) -> None:
    newest.with_suffix(".tmp").write_text(str(step))
    newest.with_suffix(".tmp").replace(newest)
