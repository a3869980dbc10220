"""`ray job submit` against a real cluster with token authentication, started here on ports of its own."""

import contextlib
import json
import os
import random
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from adaconv.tracking import provenance

REPO = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    """A head on loopback; `environment` is what its users need."""

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="adaconv-t-", dir="/tmp")  # sockets below it: keep it short
        port, dashboard = free_port(), free_port()
        self.address = f"http://127.0.0.1:{dashboard}"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # as after `. .venv/bin/activate`
        }
        command = [RAY, "start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--port", str(port)]
        command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard), "--num-cpus", "4"]
        command += ["--dashboard-agent-listen-port", str(free_port())]  # else one for every Ray of this machine
        command += ["--object-store-memory", "200000000", "--disable-usage-stats", "--temp-dir", self.folder]
        self.log = Path(self.folder) / "head.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 90
        try:
            while not self._answers():
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.5)
        except BaseException:
            self.stop()
            raise

    def _answers(self):
        try:
            return self.get("/api/jobs/", self.environment["RAY_AUTH_TOKEN"]) == 200
        except OSError:
            return False

    def get(self, path, token=None):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.address + path, headers=headers), timeout=60
            ) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def stop(self):
        with contextlib.suppress(psutil.NoSuchProcess):  # it did not even start
            head = psutil.Process(self.process.pid)
            family = head.children(recursive=True)
            self.process.terminate()
            _, alive = psutil.wait_procs([head, *family], timeout=3)
            for process in alive:
                process.kill()
        self.process.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster():
    try:
        running = Cluster()
    except AssertionError:  # somebody else took one of its ports first
        running = Cluster()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def shards(cluster, photos, tmp_path_factory):
    """A dataset, sharded by a job: its root, and the log."""
    root = tmp_path_factory.mktemp("jobs") / "photos"
    done = submit(
        cluster,
        *("python", "pipelines/shard.py", "--config", "conf/shard/smoke.yaml", "--source", photos, "--output", root),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root, done.stdout


def submit(cluster, *entrypoint, environment=None, flags=()):
    command = [RAY, "job", "submit", "--address", cluster.address, "--working-dir", ".", *flags]
    command += ["--", *map(str, entrypoint)]
    return subprocess.run(
        command,
        cwd=REPO,
        env=environment or cluster.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def test_a_shard_job_runs_on_the_cluster(shards):
    root, log = shards
    assert json.loads((root / "result.json").read_text())["books"]["found"] == 24
    assert "scan 24/24 | 100 %" in log
    assert "local cluster" not in log  # it joined the one it was submitted to


@pytest.mark.slow
def test_a_training_and_a_stylization_run_as_jobs(cluster, shards, photos, paintings, tmp_path):
    root, _ = shards
    database, commit = f"sqlite:///{tmp_path / 'mlflow.db'}", "0123456789" * 4
    tracking = ("--tracking.uri", database)
    done = submit(
        cluster,
        *("python", "pipelines/train.py", "--config", "conf/train/smoke.yaml", *tracking),
        *("--content", root, "--style", root, "--output", tmp_path / "runs"),
        *("--train.steps", 4, "--scaling.num-workers", 2),
        flags=("--runtime-env-json", json.dumps({"env_vars": {"ADACONV_GIT_COMMIT": commit}})),
    )
    assert done.returncode == 0, done.stdout[-3000:]
    result = json.loads((tmp_path / "runs" / "result.json").read_text())
    assert (result["step"], result["finished"]) == (4, True)
    tags = MlflowClient(database).get_run(result["run_id"]).data.tags
    assert (tags["git.commit"], tags["git.dirty"]) == (commit, "False")
    done = submit(
        cluster,
        *("python", "pipelines/stylize.py", "--config", "conf/stylize/smoke.yaml", "--model", result["checkpoint"]),
        *("--content", photos, "--style", paintings, "--limit-contents", 2, "--limit-styles", 2),
        *("--output", tmp_path / "stylized"),
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert json.loads((tmp_path / "stylized" / "result.json").read_text())["books"]["done"] == 4


def test_relative_paths_are_refused_in_a_job(cluster):
    done = submit(cluster, "python", "pipelines/shard.py", "--source", "tests", "--output", "out")
    assert done.returncode == 1
    assert (
        "--source tests, --output out: a Ray job runs in a copy of the working directory" in done.stdout + done.stderr
    )


def test_a_request_without_the_token_is_refused(cluster):
    assert cluster.get("/api/jobs/") == 401
    assert cluster.get("/api/jobs/", "0" * 32) == 403
    stranger = {**cluster.environment, "RAY_AUTH_MODE": "disabled"}
    stranger.pop("RAY_AUTH_TOKEN")
    assert submit(cluster, "python", "-c", "print()", environment=stranger).returncode != 0


def ours(cluster, *arguments, folder=REPO):
    command = [sys.executable, str(REPO / "pipelines" / "submit.py"), "--address", cluster.address]
    command += ["--working-dir", str(folder), "--", *arguments]
    return subprocess.run(
        command, cwd=REPO, env=cluster.environment, capture_output=True, text=True, check=False, timeout=200
    )


WHICH_CODE = """
import json, ray
from pathlib import Path
from adaconv.tracking import provenance
ray.init()  # workers of the job have the variables as well, in their command lines too
folder = Path(provenance.__file__).parents[1]
ray.get(ray.remote(lambda: 0).remote())
print("found", json.dumps([str(folder), provenance.git_tags(folder), provenance.files(folder)["git.diff"]]))
"""


def test_a_job_that_we_submit_knows_its_commit_and_what_differs(cluster, tmp_path):
    """The largest difference that travels, as it hardly can be compressed."""
    shutil.copytree(REPO / "adaconv", tmp_path / "adaconv", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "which_code.py").write_text(WHICH_CODE)
    settings = ("-c", "user.name=ann", "-c", "user.email=ann@example.org")
    for command in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "first")):
        subprocess.run(["git", *settings, *command], cwd=tmp_path, check=True)
    with (tmp_path / "which_code.py").open("a") as code:
        code.write(f"# {random.Random(1).randbytes(40_000).hex()}\n")
    there = tmp_path / "adaconv"
    assert 50_000 < len(provenance.variables(there)["ADACONV_GIT_DIFF"]) < 64_000
    done = ours(cluster, "python", "which_code.py", folder=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder, tags, diff = json.loads(re.search("found (.*)", done.stdout)[1])
    assert not Path(folder).is_relative_to(tmp_path)
    assert tags == provenance.git_tags(there)
    assert tags["git.dirty"] == "True"
    assert diff == provenance.files(there)["git.diff"]


def test_our_submit_checks_the_size_first_and_takes_over_the_exit_code(cluster, tmp_path):
    done = ours(cluster, "python", "pipelines/shard.py", "--source", "/nothing/here", "--output", str(tmp_path))
    assert done.returncode == 1
    assert "--source /nothing/here: expected a folder of images, found nothing there" in done.stdout + done.stderr
    assert "the job ended with exit code 1; its log is above" in done.stderr
    (tmp_path / "large.bin").write_bytes(bytes(101 * 2**20))
    refused = ours(cluster, "python", "x.py", folder=tmp_path)
    assert refused.returncode == 2
    assert "has 101 MiB that git does not ignore; Ray takes 100 MiB. Largest: large.bin (101 MiB)" in refused.stderr
