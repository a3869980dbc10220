"""The gallery in a real browser: quick, silent, and without a request to anywhere."""

import asyncio
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from PIL import Image

from adaconv.stylize.gallery import Failure, Picture, render
from adaconv.stylize.pictures import thumbnail

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--window-size=1400,1000", "--remote-debugging-port=0"),
)
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
        styles=[Picture(jpegs[column % 40], f"style {column:03d}") for column in range(columns)],
        cells=cells,
    )


class Browser:
    """A page of Chromium's, told what to do over its debugging protocol; keeps every event."""

    def __init__(self, socket) -> None:
        self._socket, self._number, self.events = socket, 0, []

    async def call(self, method, **params):
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        return (await self._until(lambda message: message.get("id") == self._number))["result"]

    async def wait(self, method):
        await self._until(lambda message: message.get("method") == method)

    async def evaluate(self, expression):
        answer = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        return answer["result"]["value"]

    async def _until(self, condition):
        while True:
            message = json.loads((await self._socket.receive()).data)
            self.events.append(message)
            if condition(message):
                return message

    def seen(self, method):
        return [message["params"] for message in self.events if message.get("method") == method]


async def visit(port, uri):
    """Seconds until everything in sight is drawn, images there, what using it tells, and the browser's events."""
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json") as answer:
            target = next(one for one in await answer.json() if one["type"] == "page")
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            browser = Browser(socket)
            for domain in ("Page", "Network", "Runtime", "Log"):
                await browser.call(f"{domain}.enable")
            began = time.monotonic()
            await browser.call("Page.navigate", url=uri)
            await browser.wait("Page.loadEventFired")
            images = await browser.evaluate(DRAWN)
            seconds = time.monotonic() - began
            return seconds, images, await browser.evaluate(USED), browser


def opened(html, folder):
    (folder / "gallery.html").write_text(html)
    with tempfile.TemporaryDirectory(prefix="adaconv-chromium-", ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            told = Path(profile) / "DevToolsActivePort"
            while not told.exists() or not told.read_text():
                time.sleep(0.05)
            port = told.read_text().split()[0]
            return asyncio.run(visit(port, f"file://{folder / 'gallery.html'}"))
        finally:
            process.terminate()
            process.wait()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize(("rows", "columns", "limit"), [(50, 20, 2.0), (500, 20, 10.0)], ids=["1000", "10000"])
def test_a_gallery_opens_at_once_and_asks_nobody(jpegs, tmp_path, rows, columns, limit):
    html = page(jpegs, rows, columns)
    seconds, images, told, browser = opened(html, tmp_path)
    print(f"{rows * columns} outputs, {len(html) / 1e6:.1f} MB: drawn after {seconds:.2f} s, {images} images alive")
    requested = {event["request"]["url"].partition(":")[0] for event in browser.seen("Network.requestWillBeSent")}
    assert requested <= {"file", "data"}
    assert sum(e["request"]["url"].startswith("file:") for e in browser.seen("Network.requestWillBeSent")) == 1
    assert not browser.seen("Runtime.consoleAPICalled")
    assert not browser.seen("Runtime.exceptionThrown")
    assert not browser.seen("Log.entryAdded")
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
