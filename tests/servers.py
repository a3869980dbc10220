"""Servers on loopback that tests start: an S3 server that can be made to misbehave, and a Ray cluster of its own."""

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

REPO = Path(__file__).parents[1]


class S3Server:
    """moto's S3 over HTTP, with a switch.

    mode: `up`; `busy`: every request is answered 503 the first time it is made; `down`: nobody listens. What was stored
    stays stored.
    """

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app

        self._backend = DomainDispatcherApplication(create_backend_app)
        self._server = None
        self._refused: set[tuple[str, ...]] = set()
        self.port = 0
        self.mode = "up"
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = make_server("127.0.0.1", self.port, self._answer, threaded=True)
        self.port = self._server.port
        self.mode = "up"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Cut off whoever is being answered, and listen no more."""
        self.mode = "down"
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ, start_response):
        if self.mode == "down":
            raise ConnectionError("the server is going down")
        request = tuple(environ.get(name, "") for name in ("REQUEST_METHOD", "RAW_URI", "HTTP_RANGE"))
        if self.mode == "busy" and request not in self._refused:
            self._refused.add(request)
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            start_response("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body] if environ["REQUEST_METHOD"] != "HEAD" else []
        return self._backend(environ, start_response)


HOLD = """
import json, os, sys
from adaconv.orchestration.cluster import connect
with connect():
    import ray
    address = ray.get_runtime_context().gcs_address
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    told = {name: os.environ[name] for name in names} | {"RAY_ADDRESS": address}
    print(json.dumps(told), flush=True)
    sys.stdin.read()
"""


class Cluster:
    """A local Ray cluster in a process of its own; `environment` is what a driver needs to join it."""

    def __init__(self, process: subprocess.Popen, environment: dict[str, str]) -> None:
        self._process, self.environment = process, environment

    def workers(self, doing: str) -> list[psutil.Process]:
        """Worker processes that are at a task of this name."""
        found = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            try:
                if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::") and doing in process.cmdline()[0]:
                    found.append(process)
            except psutil.Error:
                continue
        return found


@contextmanager
def ray_cluster(environment: dict[str, str]) -> Iterator[Cluster]:
    """Start a cluster whose workers have these variables, and end it."""
    whole = {**os.environ, **environment}
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        whole.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], cwd=REPO, env=whole, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        told = ""
        while not told.startswith("{"):
            told = process.stdout.readline()
            assert told, "the cluster did not start"
        yield Cluster(process, {**whole, **json.loads(told)})
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()
