"""Each service: how it is set up once, started, and asked whether it answers. All listen on 127.0.0.1 alone."""

import base64
import json
import os
import pwd
import shutil
import signal
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.local.processes import Running, StackError, binary, listens, run, start, write_private

if TYPE_CHECKING:
    from infra.local.stack import Place

BUCKETS = ("adaconv", "mlflow")
_CEPH_BYTES = 20 * 2**30  # of a sparse file: what it may grow to
_REPO = Path(__file__).parents[2]


def refuse_taken_ports(ports: Iterable[int]) -> None:
    taken = [port for port in ports if listens(port)]
    if taken:
        raise StackError(f"ports {taken} are taken; give another --base-port, or stop what listens there")


def stop_service(running: Running, stop: Any) -> None:
    # PostgreSQL takes SIGTERM as "when everybody has left", SIGINT as "now, and cleanly".
    stop(running, ask=signal.SIGINT if running.name == "postgres" else signal.SIGTERM)


# PostgreSQL


def start_postgres(place: "Place") -> Running:
    """A cluster of databases with passwords, over TCP alone."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    initdb = binary("initdb", "postgresql", folders=folders)
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
    with _postgres(place) as connection:
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


# S3: Ceph's gateway on one monitor and one store that is a file

_CEPH_CONF = """[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon}/0]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg autoscale mode = off
osd pool default pg num = 8
mon allow pool size one = true
osd crush chooseleaf type = 0
mon data avail crit = 1
ms bind msgr1 = false
ms bind ipv6 = false
ms bind port min = {first}
ms bind port max = {last}
run dir = {folder}/run
admin socket =
log file = {logs}/$name.log
log to stderr = false
mon cluster log file = {logs}/ceph.log
keyring = {folder}/$name.keyring
mon data = {folder}/mon
osd data = {folder}/osd
bluestore block size = {size}
osd memory target = 1073741824
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{s3}
rgw enable usage log = false
"""


def start_ceph(place: "Place", name: str) -> Running:
    """One of Ceph's three processes; the first start of each sets it up."""
    folder = place.folder / "ceph"
    conf = folder / "ceph.conf"
    environment = place.environment(CEPH_CONF=str(conf))
    ceph = [binary("ceph", "radosgw ceph-mon ceph-osd"), "--name", "client.admin", "--connect-timeout", "10"]

    def ask(*arguments: str, text: str = "") -> str:
        return run([*ceph, *arguments], environment=environment, text=text)

    def alive() -> bool:
        try:
            status = json.loads(ask("status", "--format", "json"))
        except StackError:
            return False
        return bool(name == "ceph-mon" or status["osdmap"]["num_up_osds"] == 1)

    if name == "ceph-mon":
        if not (folder / "mon" / "keyring").exists():
            _make_ceph(place, folder, environment)
        command = [binary("ceph-mon", "ceph-mon"), "-i", "a"]
    elif name == "ceph-osd":
        if not (folder / "osd" / "ready").exists():
            _make_osd(folder, environment, ask)
        command = [binary("ceph-osd", "ceph-osd"), "-i", "0"]
    else:
        keyring = folder / "client.rgw.keyring"
        if not keyring.exists():
            keyring.write_text(ask("auth", "get-or-create", "client.rgw", "mon", "allow rw", "osd", "allow rwx"))
        command = [binary("radosgw", "radosgw"), "-n", "client.rgw"]
    running = start(
        name,
        [*command, "--foreground"],
        log=place.logs / f"{name}.log",
        environment=environment,
        answers=(lambda: listens(place.port("s3"))) if name == "s3" else alive,
    )
    if name == "s3" and "s3_secret_key" not in place.secrets:
        # Keys that are made here would be seen in the list of processes, so Ceph makes them.
        admin = [binary("radosgw-admin", "radosgw"), "-n", "client.rgw"]
        made = run([*admin, "user", "create", "--uid", "adaconv", "--display-name", "adaconv"], environment=environment)
        (keys,) = json.loads(made[made.index("{") :])["keys"]
        place.secrets.update(s3_access_key=keys["access_key"], s3_secret_key=keys["secret_key"])
    return running


def _make_ceph(place: "Place", folder: Path, environment: dict[str, str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("", "run", "mon", "osd", "rgw"):
        (folder / name).mkdir(mode=0o700)
    fsid = str(uuid.uuid4())
    first = place.base_port + 10
    conf = _CEPH_CONF.format(
        fsid=fsid,
        mon=first,
        first=first + 1,
        last=place.base_port + 19,
        folder=folder,
        logs=place.logs,
        size=_CEPH_BYTES,
        s3=place.port("s3"),
    )
    (folder / "ceph.conf").write_text(conf)
    tool = binary("ceph-authtool", "ceph-common")
    mon, admin, monmap = folder / "mon.keyring", folder / "client.admin.keyring", folder / "monmap"
    for keyring, who, caps in ((mon, "mon.", ["mon"]), (admin, "client.admin", ["mon", "osd", "mgr"])):
        allowed = [part for cap in caps for part in ("--cap", cap, "allow *")]
        run([tool, "--create-keyring", keyring, "--gen-key", "-n", who, *allowed], environment=environment)
    run([tool, mon, "--import-keyring", admin], environment=environment)
    make = [binary("monmaptool", "ceph-base"), "--create", "--addv", "a", f"[v2:127.0.0.1:{first}]", "--fsid", fsid]
    run([*make, monmap], environment=environment)
    mkfs = ["--mkfs", "-i", "a", "--monmap", str(monmap), "--keyring", str(mon)]
    run([binary("ceph-mon", "ceph-mon"), *mkfs], environment=environment)
    mon.replace(folder / "mon.a.keyring")


def _make_osd(folder: Path, environment: dict[str, str], ask: Any) -> None:
    identity = str(uuid.uuid4())
    made = run([binary("ceph-authtool", "ceph-common"), "--gen-print-key"], environment=environment).strip()
    ask("osd", "new", identity, "-i", "-", text=json.dumps({"cephx_secret": made}))
    (folder / "osd.0.keyring").write_text(f"[osd.0]\n\tkey = {made}\n")
    run([binary("ceph-osd", "ceph-osd"), "-i", "0", "--mkfs", "--osd-uuid", identity], environment=environment)


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
    make_buckets(place)
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


def make_user(place: "Place") -> None:
    """The user of the jobs, beside the administrator."""
    answer = http_status(
        f"http://127.0.0.1:{place.port('mlflow')}/api/2.0/mlflow/users/create",
        user="admin",
        password=place.secrets["mlflow_admin_password"],
        body={"username": "adaconv", "password": place.secrets["mlflow_user_password"]},
    )
    if answer not in (200, 400):  # 400: there already
        raise StackError(f"MLflow answered {answer} when it was asked for a user; see {place.logs / 'mlflow.log'}")


def make_buckets(place: "Place") -> None:
    """Buckets that forget uploads which nobody finishes: a killed writer leaves one, and it costs."""
    import boto3
    from botocore.exceptions import ClientError

    environment = place.s3_environment()
    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )
    there = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    rule = {"ID": "unfinished", "Status": "Enabled", "Filter": {"Prefix": ""}}
    rule["AbortIncompleteMultipartUpload"] = {"DaysAfterInitiation": 1}
    for name in BUCKETS:
        try:
            if name not in there:
                client.create_bucket(Bucket=name)
            client.put_bucket_lifecycle_configuration(Bucket=name, LifecycleConfiguration={"Rules": [rule]})
        except ClientError as error:
            raise StackError(f"the S3 server does not make bucket {name}: {error}") from error


# Ray


def start_ray(place: "Place", *, num_cpus: int | None, num_gpus: int | None) -> Running:
    """A head that also works, with a token; jobs find S3 and MLflow in their environment."""
    cpus = num_cpus or max(4, os.cpu_count() or 1)
    client = place.client_environment()
    environment = place.environment(**{name: client[name] for name in client if name != "RAY_API_SERVER_ADDRESS"})
    shutil.rmtree(place.ray_folder, ignore_errors=True)
    place.ray_folder.mkdir(mode=0o700)
    port = place.port("dashboard")
    return start(
        "ray",
        [
            *(Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--disable-usage-stats"),
            *("--node-ip-address", "127.0.0.1", "--port", place.port("ray"), "--num-cpus", cpus),
            *("--dashboard-host", "127.0.0.1", "--dashboard-port", port, "--temp-dir", place.ray_folder),
            *(("--num-gpus", num_gpus) if num_gpus is not None else ()),
        ],
        log=place.logs / "ray.log",
        environment=environment,
        answers=lambda: http_status(f"http://127.0.0.1:{port}/api/jobs/", token=place.secrets["ray_token"]) == 200,
    )


# Prometheus


def start_prometheus(place: "Place") -> Running:
    """The rules of infra/monitoring, and Ray's list of its own targets."""
    port = place.port("prometheus")
    config = place.folder / "prometheus.yml"
    targets = place.ray_folder / "prom_metrics_service_discovery.json"
    text = (_REPO / "infra" / "monitoring" / "prometheus.yml").read_text()
    text = text.replace("/etc/prometheus/rules.yml", str(_REPO / "infra" / "monitoring" / "rules.yml"))
    config.write_text(text.replace("/etc/prometheus/ray/prom_metrics_service_discovery.json", str(targets)))
    return start(
        "prometheus",
        [
            *(binary("prometheus", "prometheus"), f"--config.file={config}"),
            *(f"--web.listen-address=127.0.0.1:{port}", f"--storage.tsdb.path={place.folder / 'prometheus'}"),
        ],
        log=place.logs / "prometheus.log",
        environment=place.environment(),
        answers=lambda: http_status(f"http://127.0.0.1:{port}/-/ready") == 200,
    )


def http_status(
    url: str, *, token: str = "", user: str = "", password: str = "", body: dict[str, Any] | None = None
) -> int | None:
    """The status that a URL answers with; None where nobody answers."""
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    elif user:
        headers["Authorization"] = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    request = urllib.request.Request(url, headers=headers, data=json.dumps(body).encode() if body else None)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None
