"""Generated images, small dataset versions and an S3 server: made once for all tests."""

import os
import uuid
from pathlib import Path

import boto3
import pytest
import torch

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: kernels for GPUs run, slowly, on the CPU

from adaconv import storage
from adaconv.data.manifest import DatasetVersion
from adaconv.data.synthetic import generate_paintings, generate_photos
from tests.helpers import build_version
from tests.servers import S3Server

torch.set_num_threads(1)  # the tests' networks are so small that threads would mostly wait for one another


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "photos"
    generate_photos(folder, 24, seed=0, size=144)
    return folder


@pytest.fixture(scope="session")
def paintings(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "paintings"
    generate_paintings(folder, 18, seed=0, size=144)
    return folder


@pytest.fixture(scope="session")
def content_version(photos, tmp_path_factory) -> DatasetVersion:
    return build_version(photos, str(tmp_path_factory.mktemp("data") / "photos"))


@pytest.fixture(scope="session")
def style_version(paintings, tmp_path_factory) -> DatasetVersion:
    return build_version(paintings, str(tmp_path_factory.mktemp("data") / "paintings"))


@pytest.fixture(scope="session")
def s3():
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def bucket(s3, monkeypatch):
    """URI of a new bucket, on a server that is soon given up."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ADACONV_STORAGE_PATIENCE", "4")
    storage._clients.clear()
    name = f"b{uuid.uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=name)
    yield f"s3://{name}"
    storage._clients.clear()
