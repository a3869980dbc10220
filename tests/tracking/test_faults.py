"""Whatever dies, and whenever: one run, each (metric, step) once, nothing lost, the true status.

A real MLflow server is told of trainings without a network, whose processes are real (told_training.py), and of real
ones on Ray; between them and the server is a gate that can be shut. `ADACONV_FAULTS=50` (and `ADACONV_FAULTS_FROM=0`)
says how many random faults each test goes through; each is drawn from its number.
"""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from adaconv.tracking.mlflow_tracker import sync
from adaconv.tracking.runs import client_of, reap
from tests.servers import Gate, MlflowServer
from tests.tracking.told_training import drive

REPO = Path(__file__).parents[2]
STEPS = 200
FAULTS = ("worker", "driver", "head", "stop", "down at start", "down in the middle", "down at the end", "locked")
FIRST, COUNT = int(os.environ.get("ADACONV_FAULTS_FROM", "0")), int(os.environ.get("ADACONV_FAULTS", "8"))
pytestmark = pytest.mark.slow


class Training:
    """A training in processes of its own, and what is known of it from outside. `start` and `end` differ."""

    def __init__(self, root: Path, name: str, uri: str) -> None:
        self.root, self.name, self.uri = root, name, uri
        self.folder, self._family = root / "runs" / name, []
        self.tree: psutil.Process | None = None

    def children(self, *words: str) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            family = self.tree.children(recursive=True)
            return [process for process in family if any(word in " ".join(process.cmdline()[:4]) for word in words)]
        return []

    def step(self) -> int:
        """The last step that was told, by what is on disk."""
        with contextlib.suppress(OSError, ValueError):
            lines = (self.folder / "spool" / "records.jsonl").read_bytes().splitlines()
            return max((json.loads(line)["step"] for line in lines if b'"metrics"' in line), default=0)
        return 0

    def wait_for_step(self, step: int) -> None:
        """Ray takes minutes to start on a machine that others use; a fault before the first step would be none."""
        deadline = time.monotonic() + 600
        while (found := self.step()) < step and self.running() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert found >= step, f"{self.name} was to be at step {step}, is at {found}; running: {self.running()}"

    def remember_family(self) -> None:
        self._family = []
        with contextlib.suppress(psutil.Error):
            self._family = self.tree.children(recursive=True)

    def kill(self) -> None:
        """Whatever is left of it."""
        if self.tree is not None and self.running():
            self.remember_family()
            self.tree.kill()
        self.kill_family()

    def kill_family(self) -> None:
        """Orphans of a driver that was killed."""
        for process in self._family:
            with contextlib.suppress(psutil.Error):
                process.kill()


class ToldTraining(Training):
    """Without a network; its head is the machine, on which all processes die at once."""

    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.tracking.told_training"])

    def start(self) -> None:
        self._process = self.processes.Process(target=drive, args=(self.root, self.name, self.uri, STEPS))
        self._process.start()
        self.tree = psutil.Process(self._process.pid)

    def running(self) -> bool:
        return self._process.is_alive()

    def end(self) -> int:
        self._process.join(240)
        self.kill_family()
        return self._process.exitcode

    def worker(self) -> list[psutil.Process]:
        return self.children("")

    def head(self) -> list[psutil.Process]:
        return [self.tree, *self.children("")]


class RayTraining(Training):
    """pipelines/train.py on a Ray cluster of its own."""

    def __init__(self, root: Path, name: str, uri: str, content: str, style: str) -> None:
        super().__init__(root, name, uri)
        self._command = [
            *(sys.executable, "pipelines/train.py", "--config", "conf/train/smoke.yaml", "--name", name),
            *("--content", content, "--style", style, "--output", str(root / "runs"), "--tracking.uri", uri),
            *("--train.steps", str(STEPS), "--train.log-every-steps", "1", "--checkpoint.every-steps", "40"),
            *("--data.resize", "48", "--data.crop", "32", "--data.loader-workers", "0"),
            *("--scaling.num-workers", "1", "--train.global-batch-size", "2", "--tracking.samples-every-steps", "50"),
            *("--tracking.sample-contents", "2", "--tracking.sample-styles", "2"),
        ]

    def start(self) -> None:
        # Without its head Ray's processes wait a minute for another one.
        environment = os.environ | {"RAY_gcs_rpc_server_reconnect_timeout_s": "3"}
        with (self.root / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=REPO, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        self.tree = psutil.Process(self._process.pid)

    def running(self) -> bool:
        return self._process.poll() is None

    def end(self) -> int:
        code = self._process.wait(240)
        self.kill_family()
        return code

    def worker(self) -> list[psutil.Process]:
        return self.children("RayTrainWorker")

    def head(self) -> list[psutil.Process]:
        return self.children("gcs_server", "raylet")


def kill(processes: list[psutil.Process]) -> None:
    assert processes
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def go_through(fault: str, training: Training, gate: Gate, database: Path, draw: random.Random) -> list[str]:
    """One training with one fault, and again until it is finished; returns the statuses on the way."""
    statuses = []
    if fault == "down at start":
        gate.shut()
    training.start()
    latest = STEPS // 4 if fault == "stop" else STEPS - 20  # a stop is heard within a second
    training.wait_for_step(STEPS - 1 if fault == "down at the end" else draw.randint(1, latest))
    training.remember_family()
    if fault == "worker":
        kill(training.worker())
    elif fault == "driver":
        training.tree.kill()
    elif fault == "head":
        kill(training.head())
    elif fault == "stop":
        training.tree.send_signal(signal.SIGTERM)
    elif fault == "down at start":
        gate.open()
    elif fault == "down in the middle":
        gate.shut()
        training.wait_for_step(draw.randint(STEPS - 10, STEPS))
        gate.open()
    elif fault == "down at the end":
        gate.shut()
    elif fault == "locked":
        with contextlib.closing(sqlite3.connect(database, isolation_level=None, timeout=30)) as lock:
            lock.execute("BEGIN EXCLUSIVE")
            time.sleep(draw.uniform(6, 10))  # SQLite's own patience is 5 seconds
            lock.execute("ROLLBACK")
    code = training.end()
    if fault == "down at the end":
        gate.open()
    sync(training.folder / "spool", timeout_seconds=60)
    reap(client_of(training.uri))
    statuses.append(status_of(training))
    if fault in ("driver", "head", "stop"):
        assert code != 0
        training.start()
        training.remember_family()
        code = training.end()
        sync(training.folder / "spool", timeout_seconds=60)
        statuses.append(status_of(training))
    assert code == 0
    return statuses


def status_of(training: Training) -> str:
    [run] = runs_named(training)
    return str(run.info.status)


def runs_named(training: Training):
    client = MlflowClient(training.uri)
    experiments = [found.experiment_id for found in client.search_experiments()]
    return client.search_runs(experiments, f"tags.`adaconv.run` = '{training.name}'")


TRUE_STATUSES = {"driver": ["FAILED", "FINISHED"], "head": ["FAILED", "FINISHED"], "stop": ["KILLED", "FINISHED"]}


@pytest.mark.timeout(20_000)
def test_random_faults_of_processes_and_servers(tmp_path):
    go_through_all(tmp_path, ToldTraining)


@pytest.mark.ray
@pytest.mark.timeout(20_000)
def test_random_faults_on_ray(tmp_path, content_version, style_version):
    go_through_all(tmp_path, partial(RayTraining, content=content_version.root, style=style_version.root))


def go_through_all(root, make):
    database = root / "server" / "server.db"
    server = MlflowServer(root / "server").start()
    gate = Gate(server.port).open()
    uri = f"http://127.0.0.1:{gate.port}"
    seen = Counter()
    try:
        for number in range(FIRST, FIRST + COUNT):
            fault = FAULTS[number % len(FAULTS)]
            training = make(root, f"case-{number:03d}", uri)
            began = time.monotonic()
            try:
                statuses = go_through(fault, training, gate, database, random.Random(number))
            finally:
                training.kill()
            [run] = runs_named(training)
            client = MlflowClient(server.uri)
            duplicates = missing = 0
            of_grids = set(range(0, STEPS + 1, 50))
            for metric in [name for name in run.data.metrics if not name.startswith("system/")]:
                steps = [point.step for point in client.get_metric_history(run.info.run_id, metric)]
                duplicates += len(steps) - len(set(steps))
                told = of_grids if metric.startswith("probe/") else set(range(1, STEPS + 1))
                missing += len(told - set(steps))
            images = [a.path for a in client.list_artifacts(run.info.run_id, "images") if a.path.endswith(".png")]
            grids = sorted(int(path.partition("+step+")[2].partition("+")[0]) for path in images)
            row = (number, fault, statuses, duplicates, missing, grids, f"{time.monotonic() - began:.0f} s")
            print(*row, flush=True)
            seen[fault] += 1
            assert len(run.data.metrics) > 10
            assert statuses == TRUE_STATUSES.get(fault, ["FINISHED"]), row
            assert (duplicates, missing, grids) == (0, 0, sorted(of_grids)), row
    finally:
        server.kill()
        print(f"{seen.total()} faults: {dict(seen)}", flush=True)
