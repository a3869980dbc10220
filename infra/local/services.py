"""Each service: how it is set up once, started, and asked whether it answers. All listen on 127.0.0.1 alone."""

import base64
import os
import pwd
import shutil
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.docker.make_mlflow_user import make_user
from infra.local import ceph
from infra.local.processes import (
    Running,
    StackError,
    binary,
    listens,
    run,
    start,
    stop,
    stopped_if_it_fails,
    write_private,
)

if TYPE_CHECKING:
    from infra.local.stack import Place

BUCKETS = ("adaconv", "mlflow")
_REPO = Path(__file__).parents[2]


def refuse_taken_ports(ports: Iterable[int]) -> None:
    taken = [port for port in ports if listens(port)]
    if taken:
        raise StackError(f"ports {taken} are taken; give another --base-port, or stop what listens there")


def stop_service(running: Running) -> None:
    # PostgreSQL takes SIGTERM as "when everybody has left", SIGINT as "now, and cleanly".
    stop(running, ask=signal.SIGINT if running.name == "postgres" else signal.SIGTERM)


# PostgreSQL


def start_postgres(place: "Place") -> Running:
    """A cluster of databases with passwords, over TCP alone."""
    initdb = binary("initdb")
    data = place.folder / "postgres"
    user = _postgres_user(data)
    environment = place.environment(PGPASSWORD=place.secrets["postgres_password"])
    if not (data / "PG_VERSION").exists():
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir(mode=0o700)
        password = place.folder / "postgres-password"
        write_private(password, place.secrets["postgres_password"])
        if user:
            shutil.chown(data, user)
            shutil.chown(password, user)
        try:
            run(
                [initdb, "--pgdata", data, "--username", "adaconv", "--auth", "scram-sha-256", "--pwfile", password],
                environment=environment,
                user=user,
            )
        finally:
            password.unlink()
    port = place.port("postgres")
    running = start(
        "postgres",
        [
            *(Path(initdb).with_name("postgres"), "-D", data, "-p", port),
            *("-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="),
        ],
        log=place.logs / "postgres.log",
        environment=environment,
        user=user,
        answers=lambda: _postgres_answers(place),
    )
    with stopped_if_it_fails(running), _postgres(place) as connection:
        there = {name for (name,) in connection.execute("SELECT datname FROM pg_database")}
        for name in {"mlflow", "mlflow_auth"} - there:
            connection.execute(f"CREATE DATABASE {name}")
    return running


def _postgres_user(data: Path) -> str | None:
    """PostgreSQL does not run as root: Debian's package makes a user for it."""
    if os.geteuid() != 0:
        return None
    try:
        pwd.getpwnam("postgres")
    except KeyError:
        raise StackError(
            "PostgreSQL does not run as root, and there is no user for it; apt-get install postgresql"
        ) from None
    closed = [folder for folder in data.parents if folder.exists() and not folder.stat().st_mode & 0o001]
    if closed:
        raise StackError(f"the user postgres cannot enter {closed[-1]}; give another --folder, such as one in /var/tmp")
    return "postgres"


def _postgres(place: "Place") -> Any:
    import psycopg

    return psycopg.connect(
        host="127.0.0.1",
        port=place.port("postgres"),
        user="adaconv",
        password=place.secrets["postgres_password"],
        dbname="postgres",
        autocommit=True,
        connect_timeout=5,
    )


def _postgres_answers(place: "Place") -> bool:
    import psycopg

    try:
        with _postgres(place):
            return True
    except psycopg.OperationalError:
        return False


def _database_uri(place: "Place", name: str) -> str:
    return (
        f"postgresql+psycopg://adaconv:{place.secrets['postgres_password']}@127.0.0.1:{place.port('postgres')}/{name}"
    )


# S3


def start_s3(place: "Place", name: str) -> Running:
    """One of the three processes of Ceph's S3; the gateway's first start makes the keys of its user."""
    site = ceph.Site(
        folder=place.folder / "ceph",
        logs=place.logs,
        port=place.port("s3"),
        inner_port=place.base_port + 10,
        environment=place.environment(),
    )
    running = site.start(name)
    if name == "s3" and "s3_secret_key" not in place.secrets:
        # Keys that are made here would be seen in the list of processes, so Ceph makes them.
        with stopped_if_it_fails(running):
            access, secret = site.make_user("adaconv")
        place.secrets.update(s3_access_key=access, s3_secret_key=secret)
    return running


# MLflow


def start_mlflow(place: "Place") -> Running:
    """Runs in PostgreSQL, artifacts in S3 through the server, everything behind a password."""
    port = place.port("mlflow")
    auth = place.folder / "mlflow-auth.ini"
    write_private(
        auth,
        "[mlflow]\ndefault_permission = NO_PERMISSIONS\n"
        f"database_uri = {_database_uri(place, 'mlflow_auth')}\nadmin_username = admin\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n",
    )
    # Passwords travel in the environment: everybody sees a command line.
    environment = place.environment(
        MLFLOW_BACKEND_STORE_URI=_database_uri(place, "mlflow"),
        MLFLOW_AUTH_CONFIG_PATH=str(auth),
        MLFLOW_AUTH_ADMIN_PASSWORD=place.secrets["mlflow_admin_password"],
        MLFLOW_FLASK_SERVER_SECRET_KEY=place.secrets["mlflow_secret_key"],
        MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
        MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false",
        MLFLOW_DISABLE_TELEMETRY="true",
        **place.s3_environment(),
    )
    ceph.make_buckets(BUCKETS, place.s3_environment())
    return start(
        "mlflow",
        [
            *(Path(sys.executable).with_name("mlflow"), "server", "--host", "127.0.0.1", "--port", port),
            *("--app-name", "basic-auth", "--artifacts-destination", "s3://mlflow", "--workers", 1),
            *("--allowed-hosts", f"127.0.0.1:{port},localhost:{port}", "--x-frame-options", "DENY"),
        ],
        log=place.logs / "mlflow.log",
        environment=environment,
        answers=lambda: http_status(f"http://127.0.0.1:{port}/health") == 200,
    )


def make_jobs_user(place: "Place") -> None:
    try:
        make_user(
            f"http://127.0.0.1:{place.port('mlflow')}",
            admin_password=place.secrets["mlflow_admin_password"],
            name="adaconv",
            password=place.secrets["mlflow_user_password"],
        )
    except OSError as error:
        raise StackError(f"MLflow does not make a user: {error}; see {place.logs / 'mlflow.log'}") from error


# Ray


def start_ray(place: "Place", *, num_cpus: int | None, num_gpus: int | None) -> Running:
    """A head that also works, with a token; jobs find S3 and MLflow in their environment."""
    cpus = num_cpus or max(4, os.cpu_count() or 1)
    client = place.client_environment()
    environment = place.environment(**{name: client[name] for name in client if name != "RAY_API_SERVER_ADDRESS"})
    environment["RAY_metrics_report_interval_ms"] = "2000"  # jobs on one machine are short
    shutil.rmtree(place.ray_folder, ignore_errors=True)
    place.ray_folder.mkdir(mode=0o700)
    port, agent, token = place.port("dashboard"), place.port("ray-agent"), place.secrets["ray_token"]
    return start(
        "ray",
        [
            *(Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--disable-usage-stats"),
            *("--node-ip-address", "127.0.0.1", "--port", place.port("ray"), "--num-cpus", cpus),
            *("--dashboard-host", "127.0.0.1", "--dashboard-port", port, "--temp-dir", place.ray_folder),
            # Jobs start through it. Its default is one port for every Ray of a machine, also those of pipelines alone.
            *("--dashboard-agent-listen-port", agent),
            *(("--num-gpus", num_gpus) if num_gpus is not None else ()),
        ],
        log=place.logs / "ray.log",
        environment=environment,
        answers=lambda: (
            http_status(f"http://127.0.0.1:{port}/api/jobs/", token=token) == 200
            and http_status(f"http://127.0.0.1:{agent}/api/local_raylet_healthz", token=token) == 200
        ),
    )


# Prometheus


def start_prometheus(place: "Place") -> Running:
    """The rules of infra/monitoring, and Ray's list of its own targets."""
    port = place.port("prometheus")
    config = place.folder / "prometheus.yml"
    targets = place.ray_folder / "prom_metrics_service_discovery.json"
    text = (_REPO / "infra" / "monitoring" / "prometheus.yml").read_text()
    text = text.replace("/etc/prometheus/rules.yml", str(_REPO / "infra" / "monitoring" / "rules.yml"))
    config.write_text(text.replace("/tmp/ray/prom_metrics_service_discovery.json", str(targets)))
    return start(
        "prometheus",
        [
            *(binary("prometheus"), f"--config.file={config}"),
            *(f"--web.listen-address=127.0.0.1:{port}", f"--storage.tsdb.path={place.folder / 'prometheus'}"),
        ],
        log=place.logs / "prometheus.log",
        environment=place.environment(),
        answers=lambda: http_status(f"http://127.0.0.1:{port}/-/ready") == 200,
    )


def http_status(url: str, *, token: str = "", user: str = "", password: str = "") -> int | None:
    """The status that a URL answers with; None where nobody answers."""
    headers = {}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    elif user:
        headers["Authorization"] = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None
