"""The registered model in an environment made only from what it says it requires."""

import base64
import io
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pytest
from PIL import Image

from adaconv.stylize.stylizer import Stylizer
from adaconv.tracking.mlflow_tracker import close_run, open_run
from adaconv.tracking.registry import register
from tests.helpers import save_checkpoint
from tests.servers import free_port

REPO = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

LOAD = """
import sys, io, mlflow, numpy as np
from PIL import Image
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/adaconv@champion")
import adaconv
rows = {name: [open(sys.argv[2 + i], "rb").read()] for i, name in enumerate(("content", "style"))}
open(sys.argv[4], "wb").write(model.predict(rows)["stylized"][0])
print(adaconv.__file__)
"""


@pytest.fixture(scope="module")
def champion(tmp_path_factory):
    root = tmp_path_factory.mktemp("fresh")
    uri = f"sqlite:///{root / 'mlflow.db'}"
    tracker = open_run(
        uri=uri, experiment="t", identity="run", name="run", params={}, tags={}, datasets={}, config_yaml="",
        spool_directory=root / "run" / "spool",
    )  # fmt: skip
    close_run(tracker, "FINISHED")
    _, checkpoint_uri = save_checkpoint(root / "run" / "checkpoints", **tracker.reference())
    register(checkpoint_uri, name="adaconv", alias="champion", reason="", tracking_uri=uri)
    rng = np.random.default_rng(0)
    for name, size in (("content", (60, 44)), ("style", (40, 40))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(root / f"{name}.png")
    stylizer = Stylizer.from_folder(checkpoint_uri)
    content, style = (Image.open(root / f"{name}.png") for name in ("content", "style"))
    expected = np.asarray(stylizer.stylize(content, stylizer.style_pack(style)))
    return root, uri, expected


@pytest.fixture(scope="module")
def python(champion):
    """Its requirements.txt, this project's constraints, nothing else."""
    root, uri, _ = champion
    requirements = mlflow.artifacts.download_artifacts("models:/adaconv@champion/requirements.txt", tracking_uri=uri)
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, str(root / "venv")], check=True)
    fresh = root / "venv" / "bin" / "python"
    constraints = str(REPO / "constraints.txt")
    command = [*uv, "pip", "install", "--quiet", "--python", str(fresh), "-r", requirements, "-c", constraints]
    links = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.find-links"], capture_output=True, text=True, check=False
    )
    environment = os.environ.copy()
    if links.returncode == 0 and "UV_FIND_LINKS" not in environment:
        environment["UV_FIND_LINKS"] = links.stdout.strip()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"the logged requirements cannot be installed here: {done.stderr[-2000:]}")
    return fresh


def environment_of(uri):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }


def test_it_loads_and_predicts(champion, python, tmp_path):
    root, uri, expected = champion
    done = subprocess.run(
        [python, "-c", LOAD, uri, root / "content.png", root / "style.png", tmp_path / "out.png"],
        cwd=tmp_path, env=environment_of(uri), capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert not Path(done.stdout.split()[-1]).is_relative_to(REPO)  # the model's own copy of the code
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), expected)


def test_it_serves_a_picture(champion, python, tmp_path):
    root, uri, expected = champion
    port = free_port()
    command = [python, "-m", "mlflow", "models", "serve", "-m", "models:/adaconv@champion", "--env-manager", "local",
               "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    environment = environment_of(uri)
    environment["PATH"] = f"{python.parent}:{environment['PATH']}"
    with (tmp_path / "serve.log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        row = {name: base64.b64encode((root / f"{name}.png").read_bytes()).decode() for name in ("content", "style")}
        for body in ({"dataframe_records": [row]}, {"inputs": {name: [text] for name, text in row.items()}}):
            [answer] = post(f"http://127.0.0.1:{port}/invocations", body, server, tmp_path)["predictions"]
            picture = Image.open(io.BytesIO(base64.b64decode(answer["stylized"])))
            np.testing.assert_array_equal(np.asarray(picture), expected)
    finally:
        os.killpg(server.pid, 9)
        server.wait()


def post(url, body, server, folder):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    deadline = time.monotonic() + 180
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()[-2000:]) from error
        except OSError:
            assert time.monotonic() < deadline, (folder / "serve.log").read_text()[-3000:]
            assert server.poll() is None, (folder / "serve.log").read_text()[-3000:]
            time.sleep(0.5)
