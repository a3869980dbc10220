"""What users see of a run and of a model in MLflow's own pages, in a real browser without a screen.

`ADACONV_SCREENSHOTS=FOLDER` keeps the pages and pictures of them.
"""

import os
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from adaconv.tracking.mlflow_tracker import close_run, open_run
from adaconv.tracking.registry import register
from adaconv.tracking.results import keep_results
from tests.helpers import save_checkpoint
from tests.servers import MlflowServer
from tests.tracking.browser import CHROMIUM, page_text, screenshot
from tests.tracking.grids import grid_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    root = tmp_path_factory.mktemp("ui")
    server = MlflowServer(root / "server").start()
    try:
        tracker = open_run(
            uri=server.uri,
            experiment="styles",
            name="run-1",
            params={"data": {"crop": 32}, "train": {"learning_rate": 1e-3}, "encoder": {"weights": "seeded:0"}},
            tags={"adaconv.content_hash": "c" * 64},
            datasets={"content": ("/data/photos@v1", "c" * 64)},
            config_yaml="train: {learning_rate: 1e-3}\n",
            spool_directory=root / "run-1" / "spool",
        )
        for step in range(1, 41):
            tracker.metrics({"train/loss": 3 / step, "system/cpu_utilization_percentage": 50.0 + step}, step=step)
            if step % 10 == 0:
                tracker.image("samples/grid", grid_of(2, 2, side=32, step=step), step=step)
        _, uri = save_checkpoint(root / "run-1" / "checkpoints", 40, **tracker.reference())
        tracker.checkpoint(uri, step=40)
        assert close_run(tracker, "FINISHED")
        keep_results(tracker, checkpoints=str(root / "run-1" / "checkpoints"))
        register(uri, name="adaconv", alias="champion", reason="the sharpest so far", tracking_uri=server.uri)
        experiment = MlflowClient(server.uri).get_run(tracker.run_id).info.experiment_id
        yield root, server.uri, f"{server.uri}/#/experiments/{experiment}/runs/{tracker.run_id}"
    finally:
        server.kill()


def look(root: Path, name: str, url: str) -> str:
    shot, text = screenshot(url, root / f"{name}.png"), page_text(url)
    if folder := os.environ.get("ADACONV_SCREENSHOTS"):
        shutil.copy(shot, Path(folder) / f"{name}.png")
        (Path(folder) / f"{name}.html").write_text(text)
    return text


def test_the_run_page_shows_curves_and_the_slider_of_grids(seen):
    root, _, run = seen
    text = look(root, "run-metrics", f"{run}/model-metrics")
    assert "train/loss" in text
    assert "samples/grid" in text
    assert "Step" in text or 'role="slider"' in text
    assert "plotly" in text  # the curves' own library has drawn


def test_the_run_page_shows_what_it_came_from(seen):
    root, _, run = seen
    text = look(root, "run-overview", run)
    for words in ("Finished", "train.learning_rate", "run-1", "content", "git.commit"):
        assert words in text, words


def test_the_model_page_shows_card_and_alias(seen):
    root, uri, _ = seen
    text = look(root, "model-version", f"{uri}/#/models/adaconv/versions/1")
    for words in ("champion", "the sharpest so far", "Licences", "US 12,340,440 B2", "train/loss"):
        assert words in text, words
