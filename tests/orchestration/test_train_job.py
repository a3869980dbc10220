"""Training on a real Ray cluster while ranks, drivers and nodes are lost: what was seen, and what came of it."""

import contextlib
import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import mlflow
import psutil
import pytest
import torch
from safetensors.torch import load

from adaconv import checkpoint, storage
from adaconv.orchestration import train_job
from tests.helpers import TINY_TRAINING
from tests.servers import REPO, ray_cluster

pytestmark = pytest.mark.ray
STEPS = 24

# Ray Train waits 12 s at the end of every run for a cleaner that does not leave in time; these tests' runs do not.
SCRIPT = """
import functools, runpy, sys
from ray.train.v2.api import data_parallel_trainer as trainer
trainer.PlacementGroupCleanerCallback = functools.partial(
    trainer.PlacementGroupCleanerCallback, stop_timeout=0.3, check_interval_s=0.2
)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

DRAIN = """
import sys
import ray
from ray.scripts.scripts import cli
ray.init(log_to_driver=False)
(node,) = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
cli(["drain-node", "--address", ray.get_runtime_context().gcs_address, "--node-id", node, *sys.argv[1:]])
"""


class Training:
    """One run of pipelines/train.py after another, into the same folder."""

    def __init__(self, cluster, content, style, folder: Path) -> None:
        self.cluster, self.content, self.style, self.folder = cluster, content, style, folder
        self.output = str(folder / "runs")
        self.process: subprocess.Popen | None = None

    def start(self, *flags, workers=2, **how):
        told = {
            "config": "conf/train/smoke.yaml",
            "content": self.content.root,
            "style": self.style.root,
            "output": self.output,
            **TINY_TRAINING,
            "train.steps": STEPS,
            "train.global-batch-size": 6,
            "train.schedule": "constant",
            "train.learning-rate": 1e-4,
            "train.ledger": self.folder / "ledger",
            "checkpoint.every-steps": 4,
            "tracking.samples-every-steps": 1000,
            "scaling.num-workers": workers,
        }
        words = [word for name, value in told.items() for word in (f"--{name}", *str(value).split())]
        command = [sys.executable, "-c", SCRIPT, str(REPO / "pipelines" / "train.py"), *words, *map(str, flags)]
        self.log = self.folder / "log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=self.cluster.environment, stdout=log, stderr=log, cwd=REPO, **how
            )
        return self

    def finish(self, timeout=240):
        self.process.wait(timeout)
        return self.process.returncode

    def wait_for_step(self, step):
        """Until a rank has begun this step, or all is over."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            if any(line["step"] >= step for line in self.lines()):
                return
            time.sleep(0.05)

    def lines(self):
        """Of the ledger, in the order they were written."""
        found = []
        for file in sorted((self.folder / "ledger").glob("*.jsonl")) if (self.folder / "ledger").exists() else ():
            for line in file.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    found.append({**json.loads(line), "ranks": int(file.stem.rpartition("-")[2]), "file": file.name})
        return found

    def batches(self):
        """Keys of each step's global batch; every attempt at a step must have had the same."""
        attempts = {}
        for line in self.lines():
            attempt = attempts.setdefault((line["step"], line["ranks"]), {})
            keys = (tuple(line["content"]), tuple(line["style"]))
            assert attempt.setdefault(line["rank"], keys) == keys, f"step {line['step']} was read in two ways"
        steps = {}
        for (step, ranks), shares in attempts.items():
            if len(shares) == ranks:  # else a rank was lost before it began
                whole = tuple(sum((shares[rank][stream] for rank in range(ranks)), ()) for stream in (0, 1))
                assert steps.setdefault(step, whole) == whole, f"step {step} differs by the number of ranks"
        return steps

    @property
    def checkpoints(self) -> str:
        (run,) = (uri for uri in storage.list_directories(self.output) if storage.name_of(uri).startswith("adaconv-"))
        return storage.join(run, "checkpoints")

    def weights(self):
        return load(storage.read_bytes(storage.join(self.checkpoints, checkpoint.name_of(STEPS), "model.safetensors")))

    def losses(self):
        """Step and loss, as MLflow has them."""
        client = mlflow.MlflowClient(f"sqlite:///{self.output}/mlflow.db")
        (run,) = client.search_runs([client.get_experiment_by_name("adaconv").experiment_id])
        return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")]

    def text(self):
        return self.log.read_text()


@pytest.fixture(scope="module")
def unbroken(cluster, content_version, style_version, tmp_path_factory):
    training = Training(cluster, content_version, style_version, tmp_path_factory.mktemp("unbroken"))
    assert training.start(workers=2).finish() == 0, training.text()[-3000:]
    assert sorted(training.batches()) == list(range(STEPS))
    return training


@pytest.fixture
def training(cluster, content_version, style_version, tmp_path):
    return Training(cluster, content_version, style_version, tmp_path)


def kill(process):
    with contextlib.suppress(psutil.Error, ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)


def compare(training, unbroken, *, same_ranks):
    assert training.batches() == unbroken.batches()
    ours, wanted = training.weights(), unbroken.weights()
    if same_ranks:
        assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
        return
    # Sums over ranks round otherwise, and Adam makes a whole step of any gradient, so single weights drift apart.
    assert [step for step, _ in training.losses()] == [step for step, _ in unbroken.losses()]
    assert dict(training.losses()) == pytest.approx(dict(unbroken.losses()), rel=1e-2)


def break_off(training, rng, *, workers, more=()):
    """Lose a rank or the driver at a random step, go on with other numbers of ranks, to the end."""
    fault = rng.choice(["rank", "driver"])
    training.start(*more, workers=workers)
    training.wait_for_step(rng.randrange(1, STEPS - 2))
    time.sleep(rng.uniform(0, 0.2))
    if fault == "rank":
        ranks = training.cluster.workers("RayTrainWorker")
        if ranks:
            kill(rng.choice(ranks))
        code = training.finish()
        return fault, code
    kill(training.process)
    training.process.wait(20)
    deadline = time.monotonic() + 60
    while training.cluster.workers("RayTrainWorker") and time.monotonic() < deadline:
        time.sleep(0.2)  # Ray ends them once it misses the driver
    return fault, None


@pytest.mark.slow
def test_a_lost_rank_changes_nothing(training, unbroken):
    training.start(workers=2).wait_for_step(9)
    kill(training.cluster.workers("RayTrainWorker")[1])
    assert training.finish() == 0, training.text()[-3000:]
    assert len({line["file"] for line in training.lines()}) == 4  # two ranks, twice
    compare(training, unbroken, same_ranks=True)


@pytest.mark.slow
def test_a_lost_desk_changes_nothing(training, unbroken):
    """Nor does it end a run that it was to keep an eye on: it comes again, and word still gets to the ranks."""
    training.start(workers=2).wait_for_step(9)
    kill(training.cluster.workers("_Desk")[0])
    assert training.finish() == 0, training.text()[-3000:]
    compare(training, unbroken, same_ranks=True)
    training.start("--train.steps", 2000, "--checkpoint.every-steps", 2000, workers=2).wait_for_step(STEPS + 5)
    kill(training.cluster.workers("_Desk")[0])
    while not training.cluster.workers("_Desk") and training.process.poll() is None:
        time.sleep(0.05)
    training.process.send_signal(signal.SIGTERM)
    assert training.finish() == 143, training.text()[-3000:]


@pytest.mark.slow
def test_ranks_of_a_new_run_begin_again_with_the_weights_of_another(training, unbroken, tmp_path):
    """Before it has a checkpoint of its own, where a restart at random would not be noticed."""
    whole = Training(training.cluster, training.content, training.style, tmp_path / "whole")
    whole.folder.mkdir()
    told = ("--init-from", unbroken.output, "--train.learning-rate", 5e-5, "--checkpoint.every-steps", STEPS)
    assert whole.start(*told).finish() == 0, whole.text()[-3000:]
    training.start(*told).wait_for_step(9)
    kill(training.cluster.workers("RayTrainWorker")[1])
    assert training.finish() == 0, training.text()[-3000:]
    assert [line["step"] for line in training.lines()].count(0) == 4  # two ranks, twice
    first = load(storage.read_bytes(storage.join(training.checkpoints, checkpoint.name_of(0), "model.safetensors")))
    assert all(torch.equal(first[name], unbroken.weights()[name]) for name in first)
    compare(training, whole, same_ranks=True)


@pytest.mark.slow
def test_a_lost_driver_and_another_number_of_ranks_change_no_batch(training, unbroken):
    training.start(workers=3).wait_for_step(9)
    kill(training.process)
    training.process.wait(20)
    assert training.start(workers=1).finish() == 0, training.text()[-3000:]
    assert {line["ranks"] for line in training.lines()} == {1, 3}
    compare(training, unbroken, same_ranks=False)


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_leads_to_a_checkpoint_and_again_to_an_end(times, training):
    """Ray's own answer to it is an exit with 1, of which the driver could not say what it was."""
    training.start("--train.steps", 2000, "--checkpoint.every-steps", 2000, workers=2).wait_for_step(5)
    training.process.send_signal(signal.SIGINT)
    if times == 2:
        while "once more ends them at once" not in training.text():
            time.sleep(0.01)
        training.process.send_signal(signal.SIGINT)
    code = training.process.wait(60)
    assert (code, times) in ((143, 1), (143, 2), (130, 2))  # the ranks may have been done when it came again
    if code == 130:
        assert "interrupted; the same command takes up where it stopped" in training.text()
    else:
        assert re.search(r"stopped at step \d+ with a checkpoint", training.text())
        assert 5 <= max(checkpoint.steps_in(training.checkpoints)) < 2000


@pytest.mark.slow
def test_sigterm_to_the_whole_group_of_a_local_cluster_leads_to_a_checkpoint(training):
    """As `timeout` and shells send it. Without its GCS the driver could ask no rank for anything."""
    alone = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 32}
    alone.pop("RAY_ADDRESS", None)
    training.cluster = SimpleNamespace(environment=alone)
    training.start("--train.steps", 2000, "--checkpoint.every-steps", 2000, workers=2, process_group=0)
    training.wait_for_step(5)
    assert training.process.poll() is None, training.text()[-3000:]
    os.killpg(training.process.pid, signal.SIGTERM)
    assert training.process.wait(100) == 143, training.text()[-3000:]
    assert "with a checkpoint; the same command goes on from there" in training.text()
    assert max(checkpoint.steps_in(training.checkpoints)) >= 5
    client = mlflow.MlflowClient(f"sqlite:///{training.output}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("adaconv").experiment_id])
    assert run.info.status == "KILLED"


@pytest.mark.slow
def test_an_error_in_the_data_ends_the_run_at_once_with_its_cause(training, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(training.content.root, damaged)
    for tar in (damaged / "shards").iterdir():
        tar.write_bytes(b"")
    training.content = dataclasses.replace(training.content, root=str(damaged))
    assert training.start("--data.loader-workers", 1, workers=2).finish() == 1
    assert "bytes of sample" in training.text()
    assert "Traceback" not in training.text()
    assert not training.lines()  # no rank began a step, at any attempt


@pytest.mark.slow
def test_shards_and_checkpoints_on_s3_outlive_a_server_that_is_gone_for_a_while(training, s3, bucket):
    for name, version in (("content", training.content), ("style", training.style)):
        root = storage.join(bucket, name)
        for entry in storage.walk(version.root):
            storage.publish_bytes(storage.join(root, entry.path), storage.read_bytes(entry.uri))
        setattr(training, name, dataclasses.replace(version, root=root))
    training.output = storage.join(bucket, "runs")
    cache = training.folder / "cache"
    # Of the style dataset's shards only two fit at a time, so the server is needed all along.
    limit = 2.5 * max(shard.bytes for shard in (*training.style.shards, *training.content.shards)) / 1e9
    training.start("--data.cache-dir", cache, "--data.cache-gb", limit, "--data.block-shards", 1, workers=2)
    training.wait_for_step(5)
    s3.stop()
    time.sleep(2)
    s3.start()
    assert training.finish() == 0, training.text()[-3000:]
    assert sorted(training.batches()) == list(range(STEPS))
    assert len({line["file"] for line in training.lines()}) == 2  # nobody was started again
    assert checkpoint.newest(training.checkpoints).endswith(checkpoint.name_of(STEPS))
    assert sum(path.stat().st_size for path in cache.glob("*.tar")) <= limit * 1e9


def test_more_ranks_than_fit_are_refused_at_once(training):
    assert training.start("--scaling.cpus-per-worker", 3, workers=6).finish() == 1
    assert "6 workers of 3 CPU needed, 1 fit: 1 on" in training.text()


@pytest.mark.slow
def test_restarts_that_bring_nothing_end_the_run(training):
    training.start("--scaling.max-restarts", 1, "--checkpoint.every-steps", 1000, workers=1)
    seen = set()
    while training.process.poll() is None:
        for rank in training.cluster.workers("RayTrainWorker"):
            files = {line["file"] for line in training.lines()}
            if files - seen:
                seen = files
                kill(rank)
        time.sleep(0.1)
    assert training.process.returncode == 1
    assert "1 restarts in a row (scaling.max_restarts) brought no checkpoint after step 0" in training.text()


@pytest.mark.slow
def test_a_store_that_stays_away_ends_the_run_and_is_named(training, s3, bucket):
    training.output = storage.join(bucket, "runs")
    training.start("--scaling.max-restarts", 1, "--train.steps", 100_000, workers=1).wait_for_step(9)
    s3.stop()
    try:
        assert training.finish() == 1
    finally:
        s3.start()
    assert "1 restarts in a row (scaling.max_restarts) brought no checkpoint" in training.text()
    assert f"The last one ended with: ConnectionError: {bucket}" in training.text()


def test_a_checkpoint_for_a_node_that_goes_is_asked_for_again_where_it_failed(monkeypatch):
    monkeypatch.setattr(train_job._DeskControl, "_ask", lambda self: None)
    monkeypatch.setattr(train_job, "_NOTICED_SAVE_SECONDS", 0.0)
    control = train_job._DeskControl(None)
    control._node_ends = time.time() + 120
    assert [control.word(), control.word()] == ["checkpoint", "go"]
    control.not_published()
    assert control.word() == "checkpoint"


class Rank:
    """A rank's start without a cluster: what it asks Ray for, and the desk in this process."""

    def __init__(self, monkeypatch, *, max_restarts):
        self.desk = train_job._Desk(max_restarts)
        self.ranks = 1
        context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: self.ranks)
        fake = SimpleNamespace(
            get=lambda answer: answer,
            exceptions=train_job.ray.exceptions,
            get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "node"),
            train=SimpleNamespace(
                get_context=lambda: context, torch=SimpleNamespace(get_device=lambda: torch.device("cpu"))
            ),
        )
        monkeypatch.setattr(train_job, "ray", fake)

    def __getattr__(self, name):
        return SimpleNamespace(remote=getattr(self.desk, name))

    def attempt(self, *, ranks=1):
        """What the rank raised, if anything, and what the desk has for the driver."""
        self.ranks, raised = ranks, None
        try:
            train_job._train_rank({"desk": self, "checkpoints": "s3://runs/checkpoints"})
        except Exception as error:
            raised = error
        return raised, self.desk.error()


def fails_with(error):
    def fail(*_, **__):
        raise error

    return fail


def test_a_store_that_is_away_at_each_start_is_counted_and_named(monkeypatch):
    rank = Rank(monkeypatch, max_restarts=1)
    monkeypatch.setattr(checkpoint, "steps_in", fails_with(ConnectionError("s3://runs/checkpoints: no answer")))
    assert [rank.attempt()[1] for _ in range(2)] == [None, None]
    raised, (told, code) = rank.attempt()
    assert isinstance(raised, ConnectionError)
    assert "1 restarts in a row (scaling.max_restarts)" in told
    assert "ended with: ConnectionError: s3://runs/checkpoints: no answer" in told
    assert code == 1
    assert rank.attempt()[0] is None  # who is started again ends at once, whatever the store does


def test_a_hung_worker_is_told_at_once_wherever_its_shard_lies(monkeypatch):
    """Each start says why it ends, though the next may go better; a folder's name is no sign of a lost peer."""
    rank = Rank(monkeypatch, max_restarts=3)
    hung = RuntimeError(
        "DataLoader timed out after 5 seconds; worker 0 (pid 7) was at content sample ab of /igloo/a.tar"
    )
    monkeypatch.setattr(checkpoint, "steps_in", fails_with(hung))
    for _ in range(2):
        assert rank.attempt()[1] is None
        assert rank.desk.take_lines() == [f"WARNING a rank ends: RuntimeError: {hung}"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError("s3://runs: the token has expired"), ("s3://runs: the token has expired; choose another", 1)),
        (OSError(28, "No space left on device", "/runs/x"), ("No space left on device: /runs/x", 1)),
        (ValueError("a defect"), ("Traceback", None)),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback"), ("Caught", None)),
    ],
)
def test_an_error_that_would_be_the_same_again_ends_the_run_at_once(monkeypatch, error, told):
    rank = Rank(monkeypatch, max_restarts=1)
    monkeypatch.setattr(checkpoint, "steps_in", fails_with(error))
    text, code = rank.attempt()[1]
    assert told[0] in text
    assert code == told[1]
    assert ("Traceback" in text) == (code is None)


@pytest.mark.parametrize(
    "text", ["DataLoader timed out after 300 seconds", "DataLoader worker (pid 7) is killed by signal: Killed."]
)
def test_a_lost_loader_worker_is_a_reason_to_start_again_and_told_in_the_end(monkeypatch, text):
    rank = Rank(monkeypatch, max_restarts=0)
    monkeypatch.setattr(checkpoint, "steps_in", lambda folder: {})
    monkeypatch.setattr(train_job, "_train", fails_with(RuntimeError(text)))
    assert rank.attempt()[1] is None
    assert f"ended with: RuntimeError: {text}" in rank.attempt()[1][0]


def test_no_rank_leaves_the_others_at_the_barrier(monkeypatch):
    """Whatever is at the desk when it comes: those that came before wait for it."""
    rank, reached = Rank(monkeypatch, max_restarts=0), []
    monkeypatch.setattr(checkpoint, "steps_in", lambda folder: {})
    monkeypatch.setattr(train_job, "barrier", reached.append)
    rank.desk.fail("another rank's error", 1)
    assert rank.attempt() == (None, ("another rank's error", 1))
    assert len(reached) == 1


def test_a_checkpoint_counts_from_the_moment_that_it_is_there(monkeypatch):
    """Not from the next start that finds it, for then the store may be away."""
    rank = Rank(monkeypatch, max_restarts=1)
    monkeypatch.setattr(checkpoint, "steps_in", lambda folder: {})
    monkeypatch.setattr(train_job, "_train", lambda *_: {})
    assert [rank.attempt()[1] for _ in range(2)] == [None, None]
    rank.desk.published(50_000)
    monkeypatch.setattr(checkpoint, "steps_in", fails_with(ConnectionError("s3://runs/checkpoints: no answer")))
    assert [rank.attempt()[1] for _ in range(2)] == [None, None]
    assert "brought no checkpoint after step 50000" in rank.attempt()[1][0]


def test_ranks_that_join_are_no_restart_in_vain(monkeypatch):
    rank = Rank(monkeypatch, max_restarts=1)
    monkeypatch.setattr(checkpoint, "steps_in", lambda folder: {})
    monkeypatch.setattr(train_job, "_train", lambda *_: {})
    assert [rank.attempt(ranks=ranks)[1] for ranks in (1, 2, 3, 4, 2, 4)] == [None] * 6  # one was lost
    assert "1 restarts in a row" in rank.attempt(ranks=3)[1][0]


def test_notice_of_a_node_counts_while_it_holds_a_rank(monkeypatch):
    desk, draining = Rank(monkeypatch, max_restarts=1).desk, {}
    state = SimpleNamespace(get_draining_nodes=lambda: draining)
    train_job.ray._private = SimpleNamespace(state=SimpleNamespace(state=state))
    for number, node in enumerate("ab"):
        desk.start(node, number, 2)
    assert desk.word() == (False, None)
    draining |= {"b": 5000, "c": 1000}
    assert desk.word() == (False, 5.0)
    draining["a"] = 0
    assert desk.word() == (False, 5.0)
    desk.start("a", 0, 1)
    assert desk.word() == (False, math.inf)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", range(int(os.environ.get("ADACONV_KILLS", "30"))))
def test_random_kills_change_no_batch(training, unbroken, case):
    """Ranks and drivers SIGKILLed at random steps, then another number of ranks: the ledger is the unbroken run's."""
    rng = random.Random(case)
    counts = [rng.choice([1, 2, 3, 4]) for _ in range(2)]
    fault, code = break_off(training, rng, workers=counts[0])
    if fault == "driver":
        assert training.start(workers=counts[1]).finish() == 0, training.text()[-3000:]
    else:
        assert code == 0, training.text()[-3000:]
    used = {line["ranks"] for line in training.lines()}
    compare(training, unbroken, same_ranks=used == {2})


@pytest.mark.slow
def test_two_numbers_of_workers_take_as_many_as_fit(training, unbroken):
    """Between 1 and 3, on a cluster of 4 CPUs; a rank that is lost comes back with the others."""
    training.start(workers="1 3").wait_for_step(9)
    kill(training.cluster.workers("RayTrainWorker")[0])
    assert training.finish() == 0, training.text()[-3000:]
    assert 3 in {line["ranks"] for line in training.lines()}
    compare(training, unbroken, same_ranks=False)


@pytest.mark.slow
def test_a_notice_that_a_node_goes_leads_to_checkpoints_until_it_does(s3, content_version, style_version, tmp_path):
    """Ray is told as a cloud would tell it, with a deadline; the run saves at once and again, and goes on."""
    with ray_cluster({**s3.environment, "RAY_worker_niceness": "0"}) as cluster:
        training = Training(cluster, content_version, style_version, tmp_path)
        training.start("--train.steps", 100_000, "--checkpoint.every-steps", 100_000, workers=2).wait_for_step(5)
        told = (
            "--reason",
            "DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message",
            "spot",
            "--deadline-remaining-seconds",
            90,
        )
        noticed, ages, seen = time.monotonic(), [], set()
        subprocess.run([sys.executable, "-c", DRAIN, *map(str, told)], env=cluster.environment, check=True, timeout=60)
        while len(seen) < 6 and time.monotonic() < noticed + 60:
            there = checkpoint.steps_in(training.checkpoints)
            if there and not seen:
                first_after = time.monotonic() - noticed
            if there:
                ages.append(time.time() - checkpoint.meta_of(there[max(there)])["time"])
            seen |= there.keys()
            assert len(there) <= 3 + 1 + 1  # keep_last, keep_best, and one that takes another's place just now
            time.sleep(0.05)
        print(f"first after {first_after:.1f} s; the newest of {len(seen)} never older than {max(ages):.1f} s")
        assert len(seen) == 6
        assert first_after < 60  # of 90; most of it is the start of the command that tells Ray
        assert max(ages) < 5  # what is lost, whenever the node goes
        training.wait_for_step(max(seen) + 20)
        assert max(line["step"] for line in training.lines()) >= max(seen) + 20
        assert re.search(r"a node goes in \d\d s: a checkpoint every 3 s until then", training.text())
        kill(training.process)
        training.process.wait(20)
