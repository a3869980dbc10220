"""A run's samples over time on one page: every cell where it belongs, small, and without a single request."""

import base64
import http.server
import io
import json
import re
import threading

import pytest
from mlflow import MlflowClient
from PIL import Image

from adaconv.tracking import time_machine
from adaconv.tracking.mlflow_tracker import close_run, open_run
from adaconv.tracking.time_machine import render
from pipelines import runs
from tests import browser
from tests.tracking.grids import colour_of, grid_of


def run_with(root, name, grids, *, crop, losses=None, other=False):
    tracker = open_run(
        uri=f"sqlite:///{root / 'mlflow.db'}",
        experiment="test",
        identity=name,
        name=name,
        params={"data": {"crop": crop}},
        tags={},
        datasets={},
        config_yaml="",
        spool_directory=root / name / "spool",
    )
    for step, grid in grids.items():
        tracker.image("samples/grid", grid, step=step)
        if other:
            tracker.image("samples/other", grid, step=step + 1)
        elif losses is None:
            tracker.metrics({"train/loss": 10 / (1 + step)}, step=step)
    for step, loss in (losses or {}).items():
        tracker.metrics({"train/loss": loss}, step=step)
    tracker.checkpoint(f"/runs/{name}/checkpoints/step-00000100", step=100)
    assert close_run(tracker, "FINISHED")
    return tracker


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    steps = (0, 100, 200)
    for name, side in (("first", 32), ("second", 48)):
        run_with(root, name, {step: grid_of(3, 2, side=side, step=step) for step in steps}, crop=side)
    return root, f"sqlite:///{root / 'mlflow.db'}"


def page_of(root, uri, capsys, *more):
    argv = ["page", "--run", "first", "--output", str(root / "out"), "--tracking-uri", uri, *more]
    assert runs.main(argv) == 0, capsys.readouterr().err
    return root / "out" / "time-machine.html"


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def picture(text):
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")


def close_to(pixel, colour):
    return all(abs(a - b) <= 12 for a, b in zip(pixel, colour, strict=True))


def test_every_cell_lies_where_it_belongs(two, capsys):
    root, uri = two
    first, second = data_of(page_of(root, uri, capsys, "--against", "second").read_text())
    assert (first["name"], second["name"]) == ("first", "second")
    for run, side in ((first, 32), (second, 48)):
        assert (run["rows"], run["columns"]) == (3, 2)
        assert [frame["step"] for frame in run["frames"]] == [0, 100, 200]
        assert close_to(picture(run["contents"][2]).getpixel((9, 9)), colour_of(3, 0, 0))
        assert close_to(picture(run["styles"][1]).getpixel((9, 9)), colour_of(0, 2, 0))
        for frame in run["frames"]:
            sheet = picture(frame["sheet"])
            assert sheet.size == (2 * side, 3 * side)
            for row in range(3):
                for column in range(2):
                    middle = sheet.getpixel((column * side + side // 2, row * side + side // 2))
                    assert close_to(middle, colour_of(row + 1, column + 1, frame["step"]))
        assert run["frames"][0]["checkpoint"] is None
        assert run["frames"][2]["checkpoint"]["href"] == f"file:///runs/{run['name']}/checkpoints/step-00000100"
        assert [step for step, _ in run["loss"]] == [0, 100, 200]


def test_grids_of_other_pictures_and_names_like_marks_spoil_no_page(tmp_path, caplog):
    """A run that was resumed with more samples than it began with."""
    caplog.set_level("INFO")
    grids = {0: grid_of(2, 2, side=32, step=0), 100: grid_of(3, 2, side=32, step=100)}
    tracker = run_with(tmp_path, "{{data}}", grids, crop=32)
    client = MlflowClient(tracker.uri)
    page = render(client, [client.get_run(tracker.run_id)])
    [run] = data_of(page)
    assert [frame["step"] for frame in run["frames"]] == [100]
    assert "<title>{{data}}: samples over time</title>" in page
    assert "grids of other pictures are not on the page: 1, up to step 0" in caplog.text


def test_a_series_that_is_no_grid_of_known_cells_is_one_picture(tmp_path):
    tracker = run_with(tmp_path, "odd", {0: grid_of(3, 2, side=32, step=0)[:50, :70]}, crop=32)
    client = MlflowClient(tracker.uri)
    [run] = data_of(render(client, [client.get_run(tracker.run_id)]))
    assert (run["rows"], run["columns"], run["styles"]) == (1, 1, [])
    assert picture(run["frames"][0]["sheet"]).size == (70, 50)
    assert run["aspect"] == 1.4


@pytest.mark.parametrize(
    ("size", "side", "cells"),
    [
        ((68, 104), 32, (2, 1)),
        ((68, 68), 32, (1, 1)),
        ((68, 32), 32, None),  # styles, and nothing below
        ((32, 68), 32, None),
        ((69, 68), 32, None),
        ((68, 69), 32, None),
        ((68, 68), 0, None),  # a run that does not tell its crop
    ],
)
def test_a_grid_is_known_by_its_size(size, side, cells):
    layout = time_machine._Layout.of(size, side)
    if cells:
        assert (layout.side, layout.rows, layout.columns, layout.width, layout.height) == (side, *cells, side, side)
    else:
        assert (layout.side, layout.rows, layout.columns, layout.width, layout.height) == (0, 1, 1, *size)


def told(two, name, grids=(), losses=()):
    """The page of one more run, None where it has none, and what is in it."""
    root, uri = two
    tracker = run_with(root, name, dict(grids), crop=32, losses=dict(losses))
    client = MlflowClient(uri)
    page = render(client, [client.get_run(tracker.run_id)])
    return page and data_of(page), page


def test_very_many_steps_and_points_are_thinned_evenly(two, monkeypatch):
    monkeypatch.setattr(time_machine, "_MOST_STEPS", 3)
    monkeypatch.setattr(time_machine, "_MOST_POINTS", 3)
    grids = {step: grid_of(1, 1, side=32, step=step) for step in range(0, 70, 10)}
    losses = {1: float("nan"), 2: 2.0, 3: float("inf"), 4: 4.0, 5: 0.123456789, 6: 6.0, 7: -float("inf")}
    [run], _ = told(two, "long", grids, losses)
    assert [frame["step"] for frame in run["frames"]] == [0, 30, 60]
    assert run["loss"] == [[5, 0.123457]]  # of steps 1, 3, 5 and 7, those that can be drawn


def test_a_name_ends_no_element_of_the_page(two):
    name = "a</script><b>&"
    [run], page = told(two, name, {0: grid_of(1, 1, side=32, step=0)})
    assert run["name"] == name
    assert name not in page
    assert "<title>a&lt;/script&gt;&lt;b&gt;&amp;: samples over time</title>" in page


def test_pictures_shrink_until_they_fit(two):
    root, uri = two
    grids = {step: grid_of(3, 2, side=128, step=step, noise=40) for step in (0, 1, 2, 3)}
    for grid in grids.values():
        grid[132:260, 132 + 96 : 260] = 255  # the last quarter of the first cell
    tracker = run_with(root, "noisy", grids, crop=128)
    client = MlflowClient(uri)

    def of(max_bytes):
        [run] = data_of(render(client, [client.get_run(tracker.run_id)], max_bytes=max_bytes))
        sheets = [frame["sheet"] for frame in run["frames"]]
        [size] = {picture(sheet).size for sheet in sheets}
        return size, sum(map(len, sheets + run["styles"] + run["contents"])), picture(sheets[0])

    whole, taken, _ = of(10**7)
    assert whole == (256, 384)
    small, taken_small, shown = of(taken // 2)
    assert 0.5 * taken // 2 < taken_small <= taken // 2
    assert 96 <= small[0] < 256
    assert small[1] == small[0] * 3 // 2
    cell = shown.crop((0, 0, small[0] // 2, small[1] // 3)).convert("L").resize((8, 1), Image.Resampling.BOX)
    assert [level > 150 for level in cell.getdata()] == [False] * 6 + [True] * 2  # shrunk, not cut off
    tiny, _, _ = of(1)
    assert tiny[0] // 2 in range(40, 49)  # no smaller, whatever it takes


def test_a_run_without_grids_has_no_page(two, capsys):
    root, uri = two
    assert told(two, "bare", losses={1: 1.0}) == (None, None)
    argv = ["page", "--run", "bare", "--output", str(root), "--tracking-uri", uri]
    assert runs.main(argv) == 1
    assert "run bare has logged no sample grids" in capsys.readouterr().err


def test_other_pictures_and_headers_beyond_a_side_stay_out(two):
    root, uri = two
    tracker = run_with(root, "other", {0: grid_of(1, 1, side=320, step=0)}, crop=320, other=True)
    client = MlflowClient(uri)
    [run] = data_of(render(client, [client.get_run(tracker.run_id)]))
    assert [frame["step"] for frame in run["frames"]] == [0]
    assert picture(run["contents"][0]).size == picture(run["styles"][0]).size == (256, 256)
    assert picture(run["frames"][0]["sheet"]).size == (320, 320)
    assert run["loss"] == []


def test_the_newest_checkpoint_up_to_a_step_is_beside_it():
    checkpoints = [{"step": 200, "uri": "/runs/b c"}, {"step": 100, "uri": "s3://bucket/a"}]
    found = [time_machine._checkpoint_at(checkpoints, step) for step in (99, 100, 199, 200, 999)]
    first, second = (
        {"uri": "s3://bucket/a", "href": "s3://bucket/a"},
        {"uri": "/runs/b c", "href": "file:///runs/b%20c"},
    )
    assert found == [None, first, first, second, second]
    script = "javascript:void(document.title='owned')//://"
    assert time_machine._checkpoint_at([{"step": 1, "uri": script}], 1) == {"uri": script}


def test_a_run_that_does_not_exist_is_said(two, capsys):
    root, uri = two
    argv = ["page", "--run", "third", "--output", str(root), "--tracking-uri", uri]
    assert runs.main(argv) == 1
    assert "expected one run with id or name third, found none" in capsys.readouterr().err
    argv[2] = "a'b\"c"  # which no filter of MLflow's can hold
    assert runs.main(argv) == 1
    assert "cannot look for a run of the name a'b\"c" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium on this machine")
def test_a_hundred_steps_of_64_cells_open_offline_in_at_most_20_mb(tmp_path, capsys):
    """Noisy cells of 128 px, which compress worse than pictures do. Every request would meet a proxy that notes it."""
    asked = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(403)

        do_CONNECT = do_POST = do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    grids = {step: grid_of(8, 8, side=128, step=step, noise=40) for step in range(0, 1000, 10)}
    tracker = run_with(tmp_path, "first", grids, crop=128)
    page = page_of(tmp_path, tracker.uri, capsys)
    assert 1e6 < page.stat().st_size <= 20e6
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    through = (f"--proxy-server=127.0.0.1:{proxy.server_port}", "--proxy-bypass-list=<-loopback>")
    with browser.page(*through) as shown:
        shown.open(f"{page.as_uri()}#step=500")
        shown.wait_for("document.querySelectorAll('.cell').length == 64")
        dom = shown.evaluate("document.documentElement.outerHTML")
    proxy.shutdown()
    proxy.server_close()
    # Chromium itself may ask for its own servers; the page is a file, so whatever it asked for would be there too.
    assert not [path for path in asked if "google" not in path and "gvt1" not in path], asked
    assert dom.count('class="cell"') == 64
    assert dom.count('class="style"') == dom.count('class="content"') == 8
    assert ">step 500</output>" in dom
    assert "step-00000100" in dom
    assert "blob:" in dom
