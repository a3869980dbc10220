"""Servers on loopback that tests start: S3 that can be made to misbehave, MLflow, PostgreSQL, and a Ray cluster."""

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

REPO = Path(__file__).parents[1]


class S3Server:
    """moto's S3 over HTTP, with a switch.

    mode: `up`; `busy`: every request is answered 500 the first time it is made, with which clients have no patience of
    their own, as with 503; `down`: nobody listens; `plain`: conditional writes are refused; else a code of S3 that
    every request is refused with. What was stored stays stored.
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
            return self._refuse("500 Internal Server Error", "InternalError", environ, start_response)
        if self.mode == "plain" and "HTTP_IF_NONE_MATCH" in environ:
            return self._refuse("501 Not Implemented", "NotImplemented", environ, start_response)
        if self.mode not in ("up", "busy", "plain"):
            return self._refuse("400 Bad Request", self.mode, environ, start_response)
        return self._backend(environ, start_response)

    def _refuse(self, status, code, environ, start_response):
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        body = f"<Error><Code>{code}</Code><Message>No, says the server.</Message></Error>".encode()
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body] if environ["REQUEST_METHOD"] != "HEAD" else []


class MlflowServer:
    """A real MLflow server that can be stopped, killed and started again.

    Args:
        folder: of its log, and of its database and artifacts unless these are given.
        backend: URI of the database, which goes by the environment because it may hold a password.
        artifacts: where artifacts are proxied to.
        environment: more variables, such as S3's and those of authentication.
        flags: more of the command line.
    """

    def __init__(self, folder: Path, *, backend="", artifacts="", environment=None, flags=()) -> None:
        self.port, self._folder, self._process = free_port(), folder, None
        self.uri = f"http://127.0.0.1:{self.port}"
        folder.mkdir(parents=True, exist_ok=True)
        self._command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--artifacts-destination", artifacts or str(folder / "artifacts"), "--workers", "1", *flags),
        ]
        self._environment = os.environ | {
            "MLFLOW_BACKEND_STORE_URI": backend or f"sqlite:///{folder}/server.db",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            **(environment or {}),
        }
        self._environment.pop("MLFLOW_TRACKING_URI", None)

    def start(self) -> "MlflowServer":
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self._folder, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                return self
            time.sleep(0.2)
        raise AssertionError((self._folder / "server.log").read_text()[-4000:])

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class Gate:
    """A port that leads to another one, and can be shut: what was under way is cut off, and nobody listens any more."""

    def __init__(self, to_port: int) -> None:
        self._to_port, self.port = to_port, free_port()
        self._open: list[socket.socket] = []
        self._listener = None

    def open(self) -> "Gate":
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
        return self

    def shut(self) -> None:
        for one in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = listener.accept()
                there = socket.create_connection(("127.0.0.1", self._to_port))
                self._open += [here, there]
                for pair in ((here, there), (there, here)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def postgresql(*databases: str) -> Iterator[dict[str, str]]:
    """A scratch cluster of Debian's PostgreSQL on loopback, with a password: name of each database to its URI."""
    binaries = max(Path("/usr/lib/postgresql").glob("*/bin"))
    folder = Path(tempfile.mkdtemp(prefix="adaconv-pg-", dir="/tmp"))
    as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"] if os.getuid() == 0 else []
    port, data = free_port(), folder / "data"
    (folder / "password").write_text("scratch")
    if as_user:
        for path in (folder, folder / "password"):
            shutil.chown(path, "postgres")

    def run(name: str, *arguments: str) -> None:
        environment = {**os.environ, "PGPASSWORD": "scratch", "LC_ALL": "C.UTF-8"}
        command = [*as_user, str(binaries / name), *arguments]
        subprocess.run(command, check=True, env=environment, cwd=folder, stdout=subprocess.DEVNULL)

    try:
        run("initdb", "-D", str(data), "-U", "adaconv", "-A", "scram-sha-256", f"--pwfile={folder}/password", "-N")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        run("pg_ctl", "-D", str(data), "-w", "-l", str(folder / "log"), "-o", options, "start")
        try:
            for name in databases:
                run("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "adaconv", name)
            yield {name: f"postgresql+psycopg://adaconv:scratch@127.0.0.1:{port}/{name}" for name in databases}
        finally:
            run("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "MLFLOW_TRACKING_URI"):  # MLflow sets its own
        whole.pop(name, None)
    for _ in range(3):  # Ray gives its node half a minute, and takes ports that somebody else may take first
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD], cwd=REPO, env=whole, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        told = next((line for line in process.stdout if line.startswith("{")), None)
        if told:
            break
        process.wait(180)
    assert told, "the cluster did not start"
    try:
        yield Cluster(process, {**whole, **json.loads(told)})
    finally:
        process.stdin.close()
        process.wait(180)
        process.stdout.close()
