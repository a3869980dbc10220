"""A team's tracking: PostgreSQL, artifacts proxied to S3, authentication on. All three are real."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import boto3
import numpy as np
import pytest
import requests
from mlflow import MlflowClient

from adaconv.errors import TrackingError
from adaconv.tracking.mlflow_tracker import close_run, open_run
from adaconv.tracking.registry import history_of, register, resolved_model
from adaconv.tracking.results import keep_results
from tests.helpers import save_checkpoint
from tests.servers import MlflowServer, free_port, postgresql
from tests.tracking.grids import grid_of

pytestmark = pytest.mark.slow

WHO, PASSWORD = "ann", "correct horse battery"


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    """An MLflow server on PostgreSQL and S3 that lets only those in who have an account: (server, S3 client)."""
    if not list(Path("/usr/lib/postgresql").glob("*/bin")):
        pytest.skip("no PostgreSQL here; apt-get install postgresql")
    root = tmp_path_factory.mktemp("team")
    port = free_port()
    s3 = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with postgresql("mlflow", "auth") as databases, (root / "moto.log").open("wb") as log:
        moto = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
        )
        (root / "auth.ini").write_text(
            f"[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = {databases['auth']}\n"
            "admin_username = admin\nauthorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        server = MlflowServer(
            root / "server",
            backend=databases["mlflow"],
            artifacts="s3://artifacts/mlflow",
            environment={
                **s3,
                "MLFLOW_AUTH_CONFIG_PATH": str(root / "auth.ini"),
                "MLFLOW_AUTH_ADMIN_PASSWORD": "the first password",
                "MLFLOW_FLASK_SERVER_SECRET_KEY": "scratch",
            },
            flags=("--app-name", "basic-auth"),
        )
        try:
            bucket = boto3.client(
                "s3",
                endpoint_url=s3["AWS_ENDPOINT_URL"],
                aws_access_key_id="test",
                aws_secret_access_key="test",
                region_name="us-east-1",
            )
            bucket.create_bucket(Bucket="artifacts")
            server.start()
            made = requests.post(
                f"{server.uri}/api/2.0/mlflow/users/create",
                json={"username": WHO, "password": PASSWORD},
                auth=("admin", "the first password"),
                timeout=30,
            )
            assert made.ok, made.text
            yield server, bucket
        finally:
            server.kill()
            moto.kill()
            moto.wait()


@pytest.fixture
def ann(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", WHO)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)  # the client needs no credentials of S3: artifacts go through the server


def open_one(uri, folder):
    return open_run(
        uri=uri,
        experiment="team",
        identity="run-1",
        name="run-1",
        params={"data": {"crop": 32}},
        tags={},
        datasets={"content": ("s3://data/photos@v1", "c" * 64)},
        config_yaml="a: 1\n",
        spool_directory=folder / "run-1" / "spool",
    )


def test_a_run_its_page_and_its_model_live_on_a_teams_server(team, ann, tmp_path):
    server, bucket = team
    tracker = open_one(server.uri, tmp_path)
    folder = tmp_path / "run-1" / "checkpoints"
    for step in range(1, 21):
        tracker.metrics({"train/loss": 1 / step, "train/odd": float("nan")}, step=step)
    tracker.image("samples/grid", grid_of(2, 2, side=32, step=20), step=20)
    for step in (10, 20):
        _, uri = save_checkpoint(folder, step, **tracker.reference())
        tracker.checkpoint(uri, step=step)
    assert close_run(tracker, "FINISHED")
    kept = keep_results(tracker, checkpoints=str(folder))
    assert set(kept["models"]) == {"best", "last"}
    version = register(uri, name="adaconv", alias="champion", reason="first", tracking_uri=server.uri)
    client = MlflowClient(server.uri)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert len(client.get_metric_history(tracker.run_id, "train/odd")) == 20
    assert client.get_model_version_by_alias("adaconv", "champion").tags["alias.champion.by"] == WHO
    with resolved_model("models:/adaconv@champion", tracking_uri=server.uri) as (_, local):
        weights = (local / "model.safetensors").read_bytes()
    assert weights == (folder / "step-00000020" / "model.safetensors").read_bytes()
    listed = bucket.list_objects_v2(Bucket="artifacts", Prefix="mlflow/")["Contents"]
    names = {entry["Key"].rpartition("/")[2] for entry in listed}
    assert {"time-machine.html", "config.yaml", "MODEL_CARD.md", "model.safetensors"} <= names
    assert version.run_id == tracker.run_id
    _, uri = save_checkpoint(folder, 30, **tracker.reference())
    other = register(uri, name="adaconv", alias=None, reason="", tracking_uri=server.uri)
    for number in range(7):  # a history that one tag of PostgreSQL's would not hold
        named = f"models:/adaconv/{(version, other)[number % 2].version}"
        register(named, name="adaconv", alias="long", reason="x" * 1000, tracking_uri=server.uri)
    assert len(history_of(client, "adaconv", "long")) == 7


def test_nobody_gets_in_without_an_account(team, monkeypatch, tmp_path):
    server, _ = team
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TrackingError, match=f"cannot open a run at {server.uri}"):
        open_one(server.uri, tmp_path)
    assert requests.get(f"{server.uri}/api/2.0/mlflow/experiments/search", timeout=30).status_code == 401
    assert requests.get(f"{server.uri}/health", timeout=30).ok


def test_an_artifact_of_two_gigabytes_goes_through(team, ann, tmp_path, monkeypatch):
    server, _ = team
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "900")
    tracker = open_one(server.uri, tmp_path)
    block, large = np.random.default_rng(0).bytes(2**20), tmp_path / "large.bin"
    with large.open("wb") as file:
        for number in range(2048):
            file.write(number.to_bytes(8, "big") + block[8:])
    client = MlflowClient(server.uri)
    client.log_artifact(tracker.run_id, str(large))
    expected = hashlib.file_digest(large.open("rb"), "sha256").hexdigest()
    large.unlink()
    back = Path(client.download_artifacts(tracker.run_id, "large.bin", str(tmp_path)))
    assert back.stat().st_size == 2 * 2**30
    assert hashlib.file_digest(back.open("rb"), "sha256").hexdigest() == expected
    close_run(tracker, "FINISHED")
