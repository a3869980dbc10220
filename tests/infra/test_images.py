"""The images, built for real with buildah on a Debian that debootstrap makes here, and what is and is not in them."""

import json
import os
import secrets
import shutil
import socket
import subprocess
from contextlib import contextmanager
from pathlib import Path

import boto3
import psutil
import pytest

from tests.servers import REPO

WHEELS = os.environ.get("PIP_FIND_LINKS", "")
CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"  # where Debian's package of that name keeps them
BASE = "localhost/adaconv-test-base"
STORAGE = ("--storage-driver", "vfs")
COMMIT = "0123456789" * 4
SECRET = f"planted-{secrets.token_hex(8)}"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # two builds with all that they install, on a machine that others use too
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(shutil.which(name) for name in ("buildah", "debootstrap")),
        reason="needs root, and Debian's packages buildah and debootstrap",
    ),
]


def buildah(*arguments, check=True, timeout=280):
    done = subprocess.run(
        ["buildah", *STORAGE, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=timeout
    )
    assert done.returncode == 0 or not check, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory):
    """Images of the tests lie in a folder of their own; ADACONV_IMAGE_STORE names one that stays, with its base."""
    kept = os.environ.get("ADACONV_IMAGE_STORE")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("images")
    global STORAGE
    STORAGE = ("--root", str(folder / "root"), "--runroot", str(folder / "run"), "--storage-driver", "vfs")
    yield
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def base(store, tmp_path_factory):
    """A minimal Debian with Python; it trusts whom this machine trusts, so that packages come the same way."""
    if buildah("inspect", "--type", "image", BASE, check=False).returncode == 0:
        return BASE
    root = tmp_path_factory.mktemp("debian") / "root"
    packages = "ca-certificates,python3,python3-venv"
    subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(root)],
        check=True,
        capture_output=True,
        timeout=280,
    )
    shutil.copy(Path("/") / CERTIFICATES, root / CERTIFICATES)
    (root / "etc/pip.conf").write_text(f"[global]\ncert = /{CERTIFICATES}\n")
    (root / "etc/uv").mkdir()
    (root / "etc/uv/uv.toml").write_text("native-tls = true\n")
    container = buildah("from", "scratch").stdout.strip()
    buildah("add", container, str(root), "/")
    buildah("commit", container, BASE)
    buildah("rm", container)
    shutil.rmtree(root)
    return BASE


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    """The repository as it is sent to a builder, with secrets lying about in it as they do."""
    folder = tmp_path_factory.mktemp("context") / "repo"
    shutil.copytree(REPO, folder, ignore=shutil.ignore_patterns(".venv", ".git", "__pycache__", ".*_cache", "data"))
    shutil.copytree(REPO / "adaconv" / "data", folder / "adaconv" / "data", dirs_exist_ok=True)
    for place in ("infra/compose/.env", "secrets.env", ".env"):
        (folder / place).write_text(f"RAY_AUTH_TOKEN={SECRET}\n")
    return folder


def build(base, context, file, tag):
    wheels = ("--volume", f"{WHEELS}:/wheels:ro", "--build-arg", "FIND_LINKS=/wheels") if WHEELS else ()
    buildah(
        *("bud", "--isolation", "chroot", "--network", "host", "--pull=never", "--build-arg", f"BASE={base}"),
        *(*wheels, "--build-arg", "TORCH_BACKEND=", "--build-arg", f"GIT_COMMIT={COMMIT}-dirty"),
        *("--file", context / file, "--tag", tag, context),
    )
    return tag


@pytest.fixture(scope="module")
def image(base, context):
    return build(base, context, "infra/docker/Dockerfile", "localhost/adaconv:test")


@pytest.fixture(scope="module")
def s3_image(base, context):
    return build(base, context, "infra/docker/s3.Dockerfile", "localhost/adaconv-s3:test")


@contextmanager
def container(image):
    name = buildah("from", "--pull=never", image).stdout.strip()
    try:
        yield name
    finally:
        buildah("rm", name)


def run(name, *command, check=True):
    return buildah("run", "--isolation", "chroot", name, "--", *command, check=check)


def config_of(image):
    return json.loads(buildah("inspect", "--type", "image", image).stdout)["OCIv1"]["config"]


LOADED = """
import os, sys, adaconv.model.network, mlflow, ray.data, torch
files = [getattr(module, "__cached__", None) for module in list(sys.modules.values())]
files = [file for file in files if isinstance(file, str)]
print(len(files), [file for file in files if not os.path.exists(file)])
"""


def test_a_node_runs_without_rights_with_the_pins_and_compiled(image):
    config = config_of(image)
    assert config["User"] == "1000"
    assert config["Entrypoint"] == ["/usr/bin/tini", "--"]
    with container(image) as name:
        assert run(name, "id", "-u").stdout.strip() == "1000"
        assert run(name, "sh", "-c", "touch /opt/adaconv/x", check=False).returncode != 0
        code = "import adaconv, mlflow, ray, torch, psycopg; print(ray.__version__, torch.__version__)"
        pins = dict(line.split("==") for line in (REPO / "constraints.txt").read_text().split())
        ray, torch = run(name, "python", "-c", code).stdout.split()[-2:]
        assert (ray, torch.partition("+")[0]) == (pins["ray"], pins["torch"])
        code = "from adaconv.tracking import provenance; from pathlib import Path; import adaconv; "
        code += "print(provenance.git_tags(Path(adaconv.__file__).parent))"
        told = {"git.commit": COMMIT, "git.dirty": "True", "mlflow.source.git.commit": COMMIT}
        assert run(name, "python", "-c", code).stdout.splitlines()[-1] == str(told)
        count, uncompiled = run(name, "python", "-c", LOADED).stdout.splitlines()[-1].split(maxsplit=1)
        assert int(count) > 2000
        assert uncompiled == "[]"
        run(name, "python", "pipelines/train.py", "--help")
        run(name, "python", "pipelines/shard.py", "--config", "conf/shard/coco.yaml", "--help")
        run(name, *config["Cmd"])  # the doctor, which ends with 1 where something is wrong
        # As Ray's cluster launcher has it, which calls ssh and rsync within.
        run(name, "bash", "--login", "-c", "flock --version && ray --version && ssh -V && rsync --version")
        run(name, "sh", "-c", "test -x /usr/bin/tini && test -x /usr/bin/wget && test -w /tmp/ray && ray --version")


def test_no_secret_is_in_the_images(image, s3_image):
    for tag in (image, s3_image):
        config = config_of(tag)
        assert not [entry for entry in config["Env"] if any(w in entry for w in ("PASSWORD", "TOKEN", "SECRET", "KEY"))]
        assert SECRET not in buildah("inspect", "--type", "image", tag).stdout
        with container(tag) as name:
            root = Path(buildah("mount", name).stdout.strip())
            search = ["grep", "-rlI", SECRET, str(root / "opt"), str(root / "data")]
            assert not subprocess.run(search, capture_output=True, check=False).stdout
            assert not list((root / "opt" / "adaconv").glob("**/.env*"))
            assert not (root / "opt" / "adaconv" / "tests").exists()


def free_ports():
    """Twelve in a row."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = probe.getsockname()[1]
        if first < 60_000:
            return first


def test_the_s3_server_serves_and_keeps(s3_image):
    port = free_ports()
    keys = {"aws_access_key_id": "a" * 20, "aws_secret_access_key": secrets.token_hex(20)}
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1", **keys)
    given = {**os.environ, "S3_ACCESS_KEY": keys["aws_access_key_id"], "S3_SECRET_KEY": keys["aws_secret_access_key"]}
    with container(s3_image) as name:
        for start in range(2):
            environment = [f"--env={key}={given[key]}" for key in ("S3_ACCESS_KEY", "S3_SECRET_KEY")]
            command = ["python3", "-m", "infra.local.ceph", "--folder", "/data", "--port", str(port)]
            command += ["--inner-port", str(port + 1), "--store-gb", "5", "--bucket", "adaconv"]
            server = subprocess.Popen(
                ["buildah", *STORAGE, "run", "--isolation", "chroot", *environment, name, "--", *command],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            try:
                line = server.stdout.readline()
                assert line.startswith("S3 at 127.0.0.1"), line + server.stdout.read()
                if start == 0:
                    client.put_object(Bucket="adaconv", Key="x", Body=b"kept")
                assert client.get_object(Bucket="adaconv", Key="x")["Body"].read() == b"kept"
            finally:
                end_inside(server, "infra.local.ceph")
                server.wait(60)


def end_inside(runner, word):
    """SIGTERM to the process of that name that a `buildah run` has started; all that it started has to end."""
    inside = psutil.Process(runner.pid).children(recursive=True)
    for process in inside:
        if process.name().startswith("python") and any(word in part for part in process.cmdline()):
            process.terminate()
    _, left = psutil.wait_procs(inside, timeout=60)
    for process in left:
        process.kill()
    assert not left
