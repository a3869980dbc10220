"""What users see of a run and of a model in MLflow's own pages, in a real browser without a screen.

`ADACONV_SCREENSHOTS=FOLDER` keeps the pages and pictures of them.
"""

import os
from pathlib import Path

import pytest
from mlflow import MlflowClient

from adaconv.tracking.mlflow_tracker import close_run, open_run
from adaconv.tracking.registry import register
from adaconv.tracking.results import keep_results
from tests import browser
from tests.helpers import save_checkpoint
from tests.servers import MlflowServer
from tests.tracking.grids import grid_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium on this machine"),
]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    root = tmp_path_factory.mktemp("ui")
    server = MlflowServer(root / "server").start()
    try:
        tracker = open_run(
            uri=server.uri,
            experiment="styles",
            identity="run-1",
            name="run-1",
            params={"data": {"crop": 32}, "train": {"learning_rate": 1e-3}, "encoder": {"weights": "seeded:0"}},
            tags={"adaconv.content_hash": "c" * 64},
            datasets={"content": ("/data/photos@v1", "c" * 64)},
            config_yaml="train: {learning_rate: 1e-3}\n",
            spool_directory=root / "run-1" / "spool",
        )
        for step in range(41):
            tracker.metrics({"train/loss": 3 / (step + 1), "train/style_loss": 2.0 - step / 40}, step=step)
            if step % 10 == 0:
                tracker.image("samples/grid", grid_of(2, 2, side=32, step=step), step=step)
        _, uri = save_checkpoint(root / "run-1" / "checkpoints", 40, **tracker.reference())
        tracker.checkpoint(uri, step=40)
        assert close_run(tracker, "FINISHED")
        keep_results(tracker, checkpoints=str(root / "run-1" / "checkpoints"))
        register(uri, name="adaconv", alias="champion", reason="the sharpest so far", tracking_uri=server.uri)
        experiment = MlflowClient(server.uri).get_run(tracker.run_id).info.experiment_id
        yield server.uri, f"{server.uri}/#/experiments/{experiment}/runs/{tracker.run_id}"
    finally:
        server.kill()


def look(name: str, url: str, *conditions: str) -> None:
    """Open a page and wait until all the conditions, of JavaScript, hold."""
    with browser.page(window=(1400, 1500)) as shown:
        shown.open(url)
        wait_for(shown, name, *conditions)


def wait_for(shown: browser.Page, name: str, *conditions: str) -> None:
    try:
        for condition in conditions:
            shown.wait_for(condition)
    finally:
        if folder := os.environ.get("ADACONV_SCREENSHOTS"):
            shown.screenshot(Path(folder) / f"{name}.png")
            (Path(folder) / f"{name}.html").write_text(shown.evaluate("document.documentElement.outerHTML"))


READS = "document.body.innerText.includes({!r})".format


def test_the_run_page_shows_curves(seen):
    _, run = seen
    curves = "document.querySelectorAll('.js-plotly-plot .scatterlayer .js-line').length >= 2"
    look("run-metrics", f"{run}/model-metrics", READS("train/loss"), READS("train/style_loss"), curves)


def test_the_run_page_shows_a_grid_for_each_step_of_the_slider(seen):
    _, run = seen
    grids = "[...document.images].filter(one => /get-artifact|^blob:/.test(one.src) && one.naturalWidth > 0)"
    with browser.page(window=(1400, 1500)) as shown:
        shown.open(f"{run}/model-metrics")
        wait_for(shown, "run-grid-0", READS("samples/grid"), f"{grids}.length")
        first = shown.evaluate(f"{grids}[0].src")
        shown.evaluate("document.querySelector('[role=slider]').focus()")
        shown.press("ArrowRight")
        wait_for(shown, "run-grid-1", f"{grids}[0]?.src && {grids}[0].src != {first!r}")
        assert shown.evaluate("document.querySelector('[role=slider]').getAttribute('aria-valuenow')") == "10"


def test_the_run_page_shows_what_it_came_from(seen):
    _, run = seen
    words = ("Finished", "train.learning_rate", "run-1", "content", "git.commit")
    look("run-overview", run, *map(READS, words))


def test_the_model_page_shows_card_and_alias(seen):
    uri, _ = seen
    words = ("champion", "the sharpest so far", "Licences", "US 12,340,440 B2", "train/loss")
    look("model-version", f"{uri}/#/models/adaconv/versions/1", *map(READS, words))
