"""The gallery in a real browser: quick, silent, and without a request to anywhere."""

import time

import numpy as np
import pytest
from PIL import Image

from adaconv.stylize.gallery import Failure, Picture, render
from adaconv.stylize.pictures import thumbnail
from tests import browser

DRAWN = """(async () => {
  await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
  await Promise.all([...document.images].map(image => image.decode()));
  return document.images.length;
})()"""
USED = """(async () => {
  const rows = () => document.querySelectorAll(".row"), told = {lines: rows().length};
  const count = document.getElementById("count");
  told.shown = count.textContent;
  told.link = document.querySelector(".row a").getAttribute("href");
  document.querySelector("#styles button").click();
  told.alone = rows()[0].querySelectorAll(".stylized").length;
  document.querySelector("#styles button").click();
  told.all = count.textContent;
  scrollTo(0, 1e7);
  await new Promise(done => setTimeout(done, 800));
  told.last = [...rows()].at(-1).querySelectorAll("img").length;
  told.failed = [...rows()].at(-1).querySelectorAll(".failed").length;
  told.first = rows()[0].childElementCount;
  return told;
})()"""


@pytest.fixture(scope="module")
def jpegs():
    """Noise in colours: JPEGs as large as those of photographs."""
    draw = np.random.default_rng(0)
    coarse = [Image.fromarray(draw.integers(0, 256, (30, 40, 3), dtype=np.uint8)) for _ in range(40)]
    return [thumbnail(image.resize((160, 120), Image.Resampling.BICUBIC), side=160) for image in coarse]


def page(jpegs, rows, columns):
    cells = {
        (row, column): Picture(
            jpegs[(row * 7 + column) % 40], f"{row} in the style of {column}", f"images/{column}/{row}.png"
        )
        for row in range(rows)
        for column in range(columns)
    }
    cells[rows - 1, 1] = Failure("content truncated: a & <b>")
    return render(
        title="Outputs",
        facts={"model": "m"},
        contents=[Picture(jpegs[row % 40], f"photo {row}.jpg") for row in range(rows)],
        styles=[Picture(jpegs[column % 40], f"{column}.jpg") for column in range(columns)],  # 0 is in 10
        cells=cells,
    )


def opened(html, folder):
    """Seconds until everything in sight is drawn, images there, what using it tells, and the page."""
    (folder / "gallery.html").write_text(html)
    with browser.page() as shown:
        began = time.monotonic()
        shown.open(f"file://{folder / 'gallery.html'}")
        images = shown.evaluate(DRAWN)
        return time.monotonic() - began, images, shown.evaluate(USED), shown


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize(("rows", "columns", "limit"), [(50, 20, 2.0), (500, 20, 10.0)], ids=["1000", "10000"])
def test_a_gallery_opens_at_once_and_asks_nobody(jpegs, tmp_path, rows, columns, limit):
    html = page(jpegs, rows, columns)
    seconds, images, told, shown = opened(html, tmp_path)
    print(f"{rows * columns} outputs, {len(html) / 1e6:.1f} MB: drawn after {seconds:.2f} s, {images} images alive")
    requested = {event["request"]["url"].partition(":")[0] for event in shown.seen("Network.requestWillBeSent")}
    assert requested <= {"file", "data"}
    assert sum(e["request"]["url"].startswith("file:") for e in shown.seen("Network.requestWillBeSent")) == 1
    assert not shown.seen("Runtime.consoleAPICalled")
    assert not shown.seen("Runtime.exceptionThrown")
    assert not shown.seen("Log.entryAdded")
    assert seconds < limit
    assert 21 < images < 2 * 21 * 20  # a window's worth, not all
    assert told == {
        "lines": rows,
        "shown": f"{columns} of {columns} shown",
        "all": f"{columns} of {columns} shown",
        "alone": 1,
        "link": "images/0/0.png",
        "last": 2 * (columns - 1) + 1,
        "failed": 1,
        "first": 0,
    }
