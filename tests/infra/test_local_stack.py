"""infra/local as users have it: PostgreSQL, S3, MLflow and Ray; every pipeline as a job on it, with passwords."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import boto3
import mlflow
import psutil
import pytest

from adaconv import storage
from infra.local.processes import PACKAGES, StackError, require_programs
from infra.local.services import http_status, stop_service
from infra.local.stack import Stack
from infra.monitoring.dashboard import dashboard
from tests.servers import REPO


def what_is_missing():
    try:
        require_programs(name for name in PACKAGES if name != "prometheus")
    except StackError as error:
        return str(error)
    return ""


pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(bool(what_is_missing()), reason=what_is_missing()),
]


def family(stack):
    """Every process of the stack, with those that it started."""
    found = []
    for one in stack.running.values():
        process = one.process()
        if process:
            found += [process, *process.children(recursive=True)]
    return found


def listeners(stack):
    """Addresses where a process of the stack waits for connections, and which process."""
    names = {}
    for process in family(stack):
        with suppress(psutil.Error):
            names[process.pid] = process.name()
    return {
        (connection.laddr.ip, names[connection.pid])
        for connection in psutil.net_connections("inet")
        if connection.pid in names and (connection.status == psutil.CONN_LISTEN or not connection.raddr)
    }


def is_loopback(address):
    return address.removeprefix("::ffff:").startswith("127.") or address == "::1"


def metrics(stack):
    """Names of the metrics that Ray's exporters serve, as Prometheus would find them."""
    found = set()
    with suppress(OSError, ValueError):
        targets = json.loads((stack.place.ray_folder / "prom_metrics_service_discovery.json").read_text())
        for address in targets[0]["targets"]:
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
                found |= set(re.findall(r"^(ray_\w+)", answer.read().decode(), re.MULTILINE))
    return found


class Watch:
    """What is listened at and what is counted, looked at every second, for workers come and go."""

    def __init__(self, stack):
        self.addresses, self.metrics = set(), set()
        self._stack, self._over = stack, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self):
        while not self._over.wait(1):
            self.addresses |= listeners(self._stack)
            self.metrics |= metrics(self._stack)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()


class Site:
    """The running stack, and its users' shell."""

    def __init__(self):
        # PostgreSQL's own user must be able to enter, which pytest's folders do not let it.
        self.folder = Path("/var/tmp") / f"adaconv-test-{secrets.token_hex(4)}"
        self.call("up", "--base-port", str(21000 + 20 * (os.getpid() % 400)))
        self.stack = Stack(self.folder)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "MLFLOW_"))},
            **self.stack.client_environment(),
        }
        self.said = ""

    def call(self, action, *flags, code=0):
        command = [sys.executable, "-m", "infra.local", action, "--folder", str(self.folder), *flags]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def submit(self, *command, environment=None, code=0):
        whole = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--working-dir", ".", "--"]
        done = subprocess.run(
            [*whole, *map(str, command)],
            cwd=REPO,
            env=environment or self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
        )
        self.said += done.stdout + done.stderr
        assert (done.returncode == 0) == (code == 0), done.stdout[-3000:] + done.stderr[-3000:]
        return done


@pytest.fixture(scope="module")
def site():
    with socket.socket() as another:
        with suppress(OSError):  # a Ray of this machine has it already: so much the better
            another.bind(("127.0.0.1", 52365))
            another.listen()
        site = Site()
        yield site
        site.call("down", "--purge")
    assert not site.folder.exists()
    assert not family(site.stack)


def test_up_again_changes_nothing(site):
    before = dict(site.stack.running)
    assert site.call("up").count("runs already") == len(before)
    assert Stack(site.folder).running == before


def test_secrets_are_for_their_owner_alone(site):
    for name in ("secrets.json", "stack.json", "mlflow-auth.ini"):
        assert (site.folder / name).stat().st_mode & 0o077 == 0, name
    commands = [" ".join(process.cmdline()) for process in family(site.stack)]
    assert not [line for line in commands for value in site.stack.place.secrets.values() if value in line]


def test_a_job_without_the_token_does_not_start(site):
    stranger = {**site.environment, "RAY_AUTH_MODE": "disabled"}
    del stranger["RAY_AUTH_TOKEN"]
    done = site.submit("python", "-c", "print('inside')", environment=stranger, code=1)
    assert "inside" not in done.stdout


@pytest.fixture
def kept(site, monkeypatch):
    """A run with a metric and an artifact, and an object, by the clients alone: the run's id."""
    for name, value in site.environment.items():
        monkeypatch.setenv(name, value)
    storage._clients.clear()
    storage.publish_bytes("s3://adaconv/kept", b"kept")
    client = mlflow.MlflowClient(site.environment["MLFLOW_TRACKING_URI"])
    run = client.create_run(client.create_experiment(f"kept-{secrets.token_hex(3)}"))
    client.log_metric(run.info.run_id, "train/loss", 0.5, step=3)
    client.log_text(run.info.run_id, "a text", "note.txt")
    client.set_terminated(run.info.run_id)
    yield run.info.run_id
    storage._clients.clear()


def assert_is_kept(run_id):
    client = mlflow.MlflowClient()
    assert [(point.step, point.value) for point in client.get_metric_history(run_id, "train/loss")] == [(3, 0.5)]
    assert mlflow.artifacts.load_text(f"{client.get_run(run_id).info.artifact_uri}/note.txt") == "a text"
    assert storage.read_bytes("s3://adaconv/kept") == b"kept"


def test_what_was_stored_is_there_after_a_restart(site, kept):
    site.call("down")
    assert not family(site.stack)
    assert "nothing" in site.call("status", code=1)
    site.call("up")
    site.stack = Stack(site.folder)
    assert_is_kept(kept)


def test_a_backup_of_mlflow_is_restored(site, kept, tmp_path):
    """As docs/operations.md has it: database, then artifacts; lost; back in that order."""
    place = site.stack.place
    environment = {**os.environ, "PGPASSWORD": place.secrets["postgres_password"]}
    server = ["--host", "127.0.0.1", "--port", str(place.port("postgres")), "--username", "adaconv"]
    folder = max(Path("/usr/lib/postgresql").glob("*/bin"))

    def tool(name, *arguments):
        subprocess.run([folder / name, *server, *arguments], env=environment, check=True, capture_output=True)

    for database in ("mlflow", "mlflow_auth"):
        tool("pg_dump", "--format=custom", f"--file={tmp_path / database}", database)
    artifacts = {entry.uri: storage.read_bytes(entry.uri) for entry in storage.walk("s3://mlflow")}
    assert artifacts

    stop_service(site.stack.running["mlflow"])
    for database in ("mlflow", "mlflow_auth"):
        tool("dropdb", database)
        tool("createdb", database)
    for uri in artifacts:
        storage.remove(uri)

    for database in ("mlflow", "mlflow_auth"):
        tool("pg_restore", f"--dbname={database}", str(tmp_path / database))
    for uri, data in artifacts.items():
        storage.publish_bytes(uri, data)
    site.call("up")
    site.stack = Stack(site.folder)
    assert_is_kept(kept)


@pytest.mark.skipif(not shutil.which("prometheus"), reason="needs Debian's package prometheus")
def test_prometheus_is_restarted_beside_it_and_finds_ray(site, kept):
    site.call("up", "--prometheus")
    site.stack = Stack(site.folder)
    assert all(is_loopback(address) for address, name in listeners(site.stack) if name == "prometheus")
    api = f"http://127.0.0.1:{site.stack.place.port('prometheus')}/api/v1"
    deadline = time.monotonic() + 60
    while True:
        with urllib.request.urlopen(f"{api}/query?query=up", timeout=5) as answer:
            found = json.loads(answer.read())["data"]["result"]
        if found and all(one["value"][1] == "1" for one in found):
            break
        assert time.monotonic() < deadline, found
        time.sleep(1)
    with urllib.request.urlopen(f"{api}/rules", timeout=5) as answer:
        (group,) = json.loads(answer.read())["data"]["groups"]
    assert len(group["rules"]) == 7
    assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}


@pytest.fixture(scope="module")
def flow(site, photos, paintings):
    """Raw images to stylized ones, by jobs; the addresses that were listened at meanwhile."""
    where = "s3://adaconv/flow"
    with Watch(site.stack) as seen, pytest.MonkeyPatch.context() as patch:
        for name, value in site.environment.items():
            patch.setenv(name, value)
        storage._clients.clear()
        for source, name in ((photos, "photos"), (paintings, "paintings")):
            shard = (
                "pipelines/shard.py",
                "--config",
                "conf/shard/smoke.yaml",
                "--shard.target-mb",
                0.06,
                "--source",
                source,
            )
            site.submit("python", *shard, "--output", f"{where}/{name}")
        data = ("--content", f"{where}/photos", "--style", f"{where}/paintings", "--output", f"{where}/runs")
        train = ("pipelines/train.py", "--config", "conf/train/smoke.yaml", *data)
        site.submit("python", *train, "--train.steps", 6, "--scaling.num-workers", 2)
        site.submit(
            "python", "pipelines/register.py", "--model", f"{where}/runs", "--name", "net", "--alias", "champion"
        )
        stylize = ("pipelines/stylize.py", "--config", "conf/stylize/smoke.yaml", "--model", "models:/net@champion")
        inputs = ("--content", photos, "--style", paintings, "--limit-contents", 3, "--limit-styles", 2)
        site.submit("python", *stylize, *inputs, "--output", f"{where}/stylized")
        yield where, seen
        storage._clients.clear()


def result_of(folder):
    return json.loads(storage.read_bytes(f"{folder}/result.json"))


def test_every_pipeline_runs_as_a_job_on_it(flow):
    where, _ = flow
    assert result_of(f"{where}/photos")["books"]["found"] == 24
    trained = result_of(f"{where}/runs")
    assert (trained["step"], trained["finished"]) == (6, True)
    assert result_of(f"{where}/stylized")["books"] == {"pairs": 6, "done": 6, "skipped": 0, "failed": 0}
    run = mlflow.MlflowClient().get_run(trained["run_id"])
    assert run.info.status == "FINISHED"
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    version = mlflow.MlflowClient().get_model_version_by_alias("net", "champion")
    assert version.status == "READY"


# A rank, whose process is called after what it is at.
_TORCH = ("ray::RayTrainWorker", "ray::execute._setup_torch_process_group")


def test_nothing_listens_beyond_loopback_but_torchs_own(site, flow):
    _, seen = flow
    assert {name for _, name in seen.addresses} >= {"postgres", "radosgw", "gcs_server", "raylet"}
    # While ranks train together, torch's rendezvous store listens everywhere, and can be told nothing else.
    beyond = [(address, name) for address, name in seen.addresses if not is_loopback(address)]
    assert not [one for one in beyond if one[0] != "::" or not one[1].startswith(_TORCH)], beyond


def test_what_the_dashboard_shows_is_counted(flow):
    _, seen = flow
    asked = {
        name
        for panel in dashboard()["panels"]
        for one in panel["targets"]
        for name in re.findall(r"ray_\w+", one["expr"])
    }
    assert asked - seen.metrics <= {"ray_node_gpus_utilization"}  # there is none here


def test_a_request_without_its_password_is_refused(site, flow):
    client = site.environment
    ray, mlflow_server = client["RAY_API_SERVER_ADDRESS"], client["MLFLOW_TRACKING_URI"]
    assert http_status(f"{ray}/api/jobs/") == 401
    assert http_status(f"{ray}/api/jobs/", token="0" * 40) == 403
    assert http_status(f"{ray}/api/jobs/", token=client["RAY_AUTH_TOKEN"]) == 200
    search = f"{mlflow_server}/api/2.0/mlflow/experiments/search?max_results=5"
    assert http_status(search) == 401
    assert http_status(search, user="adaconv", password="wrong") == 401
    assert http_status(search, user="adaconv", password=client["MLFLOW_TRACKING_PASSWORD"]) == 200
    assert http_status(f"{mlflow_server}/metrics") in (401, 404)
    s3 = {"endpoint_url": client["AWS_ENDPOINT_URL"], "aws_access_key_id": client["AWS_ACCESS_KEY_ID"]}
    with pytest.raises(Exception, match="SignatureDoesNotMatch"):
        boto3.client("s3", **s3, aws_secret_access_key="wrong" * 8).list_buckets()
    assert http_status(f"{client['AWS_ENDPOINT_URL']}/adaconv") == 403
    with pytest.raises(Exception, match="password authentication failed"):
        psycopg_connect(site, "wrong")


def psycopg_connect(site, password):
    import psycopg

    port = site.stack.place.port("postgres")
    return psycopg.connect(host="127.0.0.1", port=port, user="adaconv", password=password, dbname="mlflow")


def test_secrets_are_in_no_log_no_run_no_output(site, flow):
    """What jobs printed, what every server and Ray logged, what lies in S3, and what MLflow's database holds."""
    place = site.stack.place
    hidden = {name: value.encode() for name, value in place.secrets.items() if name != "s3_access_key"}
    written = {"jobs' output": site.said.encode()}
    for folder in (place.logs, place.ray_folder):
        written |= {
            str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()
        }
    for bucket in ("s3://adaconv", "s3://mlflow"):
        written |= {entry.uri: storage.read_bytes(entry.uri) for entry in storage.walk(bucket)}
    with psycopg_connect(site, place.secrets["postgres_password"]) as connection:
        for table in ("params", "tags", "metrics", "latest_metrics", "inputs", "datasets", "model_versions"):
            written[table] = str(connection.execute(f"SELECT * FROM {table}").fetchall()).encode()
    assert len(written) > 50
    found = {(name, place_of) for place_of, data in written.items() for name, value in hidden.items() if value in data}
    assert not found
