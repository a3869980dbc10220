"""The demo on real Ray and real MLflow: raw images to stylized ones, and every stage again."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import mlflow
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from adaconv.data.manifest import open_version

REPO = Path(__file__).parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]


def pipeline(name, *arguments, cwd=REPO, check=True):
    """Run a pipeline as a user does."""
    done = subprocess.run(
        [sys.executable, str(REPO / "pipelines" / f"{name}.py"), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,  # five pipelines, each with a Ray of its own, beside whatever else runs here
    )
    if check:
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def demo(photos, paintings, tmp_path_factory):
    root = tmp_path_factory.mktemp("the demo")
    flags = ("--steps", 20, "--grid-contents", 3, "--grid-styles", 2, "--content", photos, "--style", paintings)
    done = pipeline("demo", "--output", root, *flags)
    return root, done, flags


def client_of(root):
    return mlflow.MlflowClient(f"sqlite:///{root / 'mlflow.db'}")


def test_the_demo_ends_with_its_results(demo):
    root, done, _ = demo
    result = json.loads((root / "result.json").read_text())
    assert result["status"] == "done"
    assert result["model"] == "models:/adaconv@champion"
    assert list(result["seconds_of"]) == ["shard photographs", "shard paintings", "train", "register", "stylize"]
    assert shlex.split(result["mlflow_ui"])[:2] == ["mlflow", "ui"]
    assert f"sqlite:///{root}/mlflow.db" in shlex.split(result["mlflow_ui"])
    assert Path(result["gallery"]).exists()
    assert Path(result["samples_over_time"]).exists()
    assert "Traceback" not in done.stdout + done.stderr


def test_stages_show_their_configuration_and_progress(demo):
    log = demo[1].stdout
    assert log.count("resolved configuration") == 6
    for pattern in (
        r"scan 24/24 \| 100 % \| .* images/s",
        r"step 00020/20 \| loss [\d.]+ \| content [\d.]+ \| style [\d.]+ \| lr .* img/s \| data wait \d+% \| eta 0 s",
        r"stylize 6/6 \| 100 % \| .* images/s \| 0 skipped \| 0 failed",
    ):
        assert re.search(pattern, log), pattern
    assert not demo[1].stderr.replace("Created version", "").count("Error")


def test_the_datasets_books_are_closed(demo):
    for name, count in (("photos", 24), ("paintings", 18)):
        version = open_version(str(demo[0] / "data" / name))
        assert version.books["found"] == count == sum(shard.rows for shard in version.shards)


def test_one_finished_run_holds_curves_grids_and_lineage(demo):
    root = demo[0]
    client = client_of(root)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert [run.info.status for run in runs] == ["FINISHED"]
    run = runs[0]
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in history] == [10, 20]
    assert (Path(run.data.tags["adaconv.folder"]) / "id").read_text() == run.data.tags["adaconv.id"]
    assert run.data.params["train.global_batch_size"] == "4"
    assert run.data.tags["adaconv.content_hash"] == open_version(str(root / "data" / "photos")).root_hash
    assert {i.dataset.name for i in run.inputs.dataset_inputs} == {"content", "style"}
    images = [f.path for f in client.list_artifacts(run.info.run_id, "images")]
    assert any("grid" in path and "step+0" in path for path in images)
    files = {f.path for f in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "environment.txt", "checkpoints.json", "time-machine.html"} <= files
    models = client.search_logged_models([run.info.experiment_id])
    assert {model.tags["adaconv.roles"] for model in models} == {"best,last"}  # registered as it is


LOAD = """
import sys, mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1])
picture = np.zeros((1, 40, 48, 3), np.uint8)
stylized = mlflow.pyfunc.load_model("models:/adaconv@champion").predict({"content": picture, "style": picture})
print(stylized.shape, stylized.dtype)
"""


def test_the_champion_loads_where_only_mlflow_is_known(demo, tmp_path):
    """From another folder, so that the model's own copy of the code is what runs."""
    root = demo[0]
    version = client_of(root).get_model_version_by_alias("adaconv", "champion")
    assert version.run_id == json.loads((root / "result.json").read_text())["run_id"]
    assert version.tags["alias.champion.reason"] == "made by the demo"
    uri = f"sqlite:///{root / 'mlflow.db'}"
    done = subprocess.run([sys.executable, "-c", LOAD, uri], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("(1, 40, 48, 3) uint8"), done.stderr


def test_outputs_are_in_the_index_and_the_gallery(demo):
    folder = demo[0] / "stylized"
    table = pq.read_table(folder / "index.parquet")
    assert table["state"].to_pylist() == ["done"] * 6
    for row in table.to_pylist():
        with Image.open(folder / row["output"]) as image:
            assert image.size == (row["width"], row["height"])
    assert len({(folder / name).read_bytes() for name in table["output"].to_pylist()}) == 6
    page = (folder / "gallery.html").read_text()
    links = re.findall(r'"link":"(images/[^"]+)"', page)
    assert len(links) == 6
    assert all((folder / link).exists() for link in links)


def test_a_demo_that_is_asked_to_stop_leaves_no_stage_at_work(tmp_path):
    root = tmp_path / "demo"
    script = str(REPO / "pipelines" / "demo.py")
    command = [sys.executable, script, "--output", str(root), "--images", "8"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout
        next(line for line in process.stdout if "pipelines/shard.py: resolved configuration" in line)
        process.terminate()
        rest = process.stdout.read()  # until the stage has ended as well, which has the same pipe
    assert process.returncode == 1
    assert "===" not in rest  # no other stage was begun
    told = [" ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])]
    assert not [line for line in told if str(root) in line]


@pytest.mark.slow
def test_everything_again_makes_nothing_new(demo):
    root, _, flags = demo
    before = {path: path.stat().st_mtime_ns for path in (root / "stylized" / "images").rglob("*.png")}
    done = pipeline("demo", "--output", root, *flags)
    assert "has its 20 steps already" in done.stdout
    assert json.loads((root / "stylized" / "result.json").read_text())["books"]["skipped"] == 6
    assert {path: path.stat().st_mtime_ns for path in (root / "stylized" / "images").rglob("*.png")} == before
    client = client_of(root)
    assert len(client.search_runs([e.experiment_id for e in client.search_experiments()])) == 1


@pytest.mark.slow
def test_a_broken_content_fails_alone(demo, photos, tmp_path):
    """One bad file: the others are made, the job names it and ends with 1."""
    root = demo[0]
    folder = tmp_path / "contents"
    folder.mkdir()
    good = sorted(photos.iterdir())[0]
    (folder / "good.jpg").write_bytes(good.read_bytes())
    (folder / "cut.jpg").write_bytes(good.read_bytes()[:2000])
    done = pipeline(
        "stylize",
        *("--config", REPO / "conf" / "stylize" / "smoke.yaml", "--model", "models:/adaconv@champion"),
        *("--tracking.uri", f"sqlite:///{root / 'mlflow.db'}", "--content", folder),
        *("--style", demo[2][-1], "--limit-styles", 2, "--output", tmp_path / "out"),
        check=False,
    )
    assert done.returncode == 1
    assert "2 of 4 outputs could not be made: content truncated" in done.stderr
    assert "cut.jpg" in done.stderr
    assert "Traceback" not in done.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["books"] == {"pairs": 4, "done": 2, "skipped": 0, "failed": 2}
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 2
