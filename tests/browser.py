"""A real browser without a screen, told what to do over its debugging protocol."""

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--remote-debugging-port=0"),
)

_KEYS = {"ArrowLeft": 37, "ArrowRight": 39}


class Page:
    """An empty page at first. Keeps every event that the browser told."""

    def __init__(self, runner: asyncio.Runner, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._runner, self._socket, self._number = runner, socket, 0
        self.events: list[dict[str, Any]] = []

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)
        self._until(lambda message: message.get("method") == "Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """The value of an expression, of a promise when it is kept."""
        answer = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60) -> None:
        """Until it is true; what the page shows instead is in the error."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"not true in {seconds:g} s: {expression}; the page:\n{self.text()}"
            time.sleep(0.2)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=_KEYS[key])

    def text(self) -> str:
        """What a user could read."""
        return str(self.evaluate("document.body.innerText"))

    def screenshot(self, target: Path) -> None:
        target.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def seen(self, method: str) -> list[dict[str, Any]]:
        return [message["params"] for message in self.events if message.get("method") == method]

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        self._runner.run(self._socket.send_json({"id": number, "method": method, "params": params}))
        answer = self._until(lambda message: message.get("id") == number)
        assert "result" in answer, answer
        return dict(answer["result"])

    def _until(self, condition: Any) -> dict[str, Any]:
        while True:
            message = json.loads(self._runner.run(self._socket.receive()).data)
            self.events.append(message)
            if condition(message):
                return dict(message)


@contextmanager
def page(*flags: str, window: tuple[int, int] = (1400, 1000)) -> Iterator[Page]:
    """A page of a browser of its own."""
    assert CHROMIUM
    with tempfile.TemporaryDirectory(prefix="adaconv-chromium-", ignore_cleanup_errors=True) as profile:
        size = f"--window-size={window[0]},{window[1]}"
        command = [CHROMIUM, *_FLAGS, size, f"--user-data-dir={profile}", *flags, "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            told = Path(profile) / "DevToolsActivePort"
            while not told.exists() or not told.read_text():
                assert process.poll() is None, "the browser ended at its start"
                time.sleep(0.05)
            with asyncio.Runner() as runner:
                session, socket = runner.run(_connect(told.read_text().split()[0]))
                try:
                    opened = Page(runner, socket)
                    for domain in ("Page", "Network", "Runtime", "Log"):
                        opened._call(f"{domain}.enable")
                    yield opened
                finally:
                    runner.run(session.close())
        finally:
            process.terminate()
            process.wait()


async def _connect(port: str) -> tuple[aiohttp.ClientSession, aiohttp.ClientWebSocketResponse]:
    session = aiohttp.ClientSession()
    async with session.get(f"http://127.0.0.1:{port}/json") as answer:
        target = next(one for one in await answer.json() if one["type"] == "page")
    return session, await session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0)
