"""A node of three is lost in the middle of a job, switched off or cut off: the job makes what it would have made."""

import hashlib
import json
import os
import random
import secrets
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from adaconv import storage
from adaconv.data.synthetic import generate_photos
from tests.helpers import build_version
from tests.infra.nodes import Site, can_make_hosts
from tests.orchestration.runs import hashes_of
from tests.servers import REPO

RUNS = int(os.environ.get("ADACONV_NODE_LOSS_RUNS", "3"))
STEPS = 60
NOTICE = 20  # seconds from SIGTERM to the end of a node
EC2_NOTICE = 60  # EC2 itself gives 120; starting Ray's command takes its time on a busy machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(not can_make_hosts(), reason="needs root, and ip, unshare and nsenter for network namespaces"),
]


@pytest.fixture(scope="module")
def shared():
    """A folder that every host sees, as with a file server; each has a /tmp of its own."""
    folder = Path("/var/tmp") / f"adaconv-nodes-{secrets.token_hex(3)}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def site(shared):
    environment = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(NOTICE)}
    site = Site(shared, environment)
    yield site
    site.close()


def lose(site, number, how):
    host = site.hosts[number]
    if how == "switched off":
        host.power_off()
    else:
        host.plug(False)


def bring_back(site, number, how):
    if how == "switched off":
        site.switch_on(number)
    else:
        site.hosts[number].plug(True)
    site.wait_for_nodes(len(site.hosts))


def busy(site, word):
    """Numbers of the hosts, other than the head, where a worker of this name runs."""
    found = []
    for number, host in enumerate(site.hosts[1:], start=1):
        names = []
        for process in psutil.Process(host.process.pid).children(recursive=True):
            try:
                names.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        if any(name.startswith("ray::") and word in name for name in names):
            found.append(number)
    return found


def wait_for(condition, driver, log, *, seconds=150):
    deadline = time.monotonic() + seconds
    while not condition():
        assert driver.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.1)


def finish(driver, log, *, seconds=240):
    code = driver.wait(seconds)
    assert code == 0, log.read_text()[-6000:]
    assert "Traceback" not in log.read_text()


# Training: two ranks on two nodes


@pytest.fixture(scope="module")
def data(shared, photos, paintings):
    return [build_version(folder, str(shared / folder.name)).root for folder in (photos, paintings)]


def train(site, data, output, log, *flags):
    content, style = data
    command = [sys.executable, str(REPO / "pipelines" / "train.py"), "--config", str(REPO / "conf/train/smoke.yaml")]
    command += ["--content", content, "--style", style, "--output", str(output), "--train.steps", str(STEPS)]
    command += ["--scaling.num-workers", "2", "--scaling.threads-per-worker", "1"]
    command += ["--checkpoint.every-steps", "10", "--train.log-every-steps", "5"]
    return site.drive(*command, *flags, log=log)


def weights(output):
    result = json.loads((output / "result.json").read_text())
    assert (result["step"], result["finished"]) == (STEPS, True)
    return hashlib.sha256((Path(result["checkpoint"]) / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def trained(site, data, shared):
    """Weights of a training that nothing happened to, over two nodes."""
    log = shared / "undisturbed.log"
    driver = train(site, data, shared / "undisturbed", log)
    finish(driver, log)
    return weights(shared / "undisturbed")


@pytest.mark.parametrize("run", range(RUNS))
@pytest.mark.parametrize("how", ["switched off", "cut off"])
def test_training_survives_a_lost_node_to_the_bit(site, data, trained, shared, how, run):
    output, log = shared / f"train-{how[:3]}-{run}", shared / f"train-{how[:3]}-{run}.log"
    began = time.monotonic()
    driver = train(site, data, output, log)
    wait_for(lambda: list(output.glob("*/checkpoints/step-00000010/meta.json")), driver, log)
    lost = random.choice(busy(site, "RayTrainWorker"))
    time.sleep(random.uniform(0, 1))
    assert driver.poll() is None
    assert not list(output.glob(f"*/checkpoints/step-{STEPS:08d}"))  # in the middle
    lose(site, lost, how)
    try:
        finish(driver, log)
        seconds = time.monotonic() - began
    finally:
        bring_back(site, lost, how)
    assert weights(output) == trained
    print(f"training, {how}: node{lost}, {seconds:.0f} s")


def groups(ledger):
    """Of each start of the ranks, in order: the steps that its first rank began."""
    files = sorted(ledger.glob("*-rank-0-of-2.jsonl"))
    return [[json.loads(line)["step"] for line in file.read_text().splitlines() if line[-1] == "}"] for file in files]


@pytest.mark.parametrize("how", ["SIGTERM", "EC2"])
def test_a_node_that_is_given_notice_costs_seconds_of_training(site, data, shared, how):
    """As Kubernetes gives it, by SIGTERM to `ray start --block`, and as EC2 does. No other checkpoint is due."""
    output, log, ledger = shared / f"notice-{how}", shared / f"notice-{how}.log", shared / f"ledger-{how}"
    flags = ("--train.steps", "100000", "--checkpoint.every-steps", "100000", "--train.ledger", str(ledger))
    driver, began = train(site, data, output, log, *flags), {}

    def is_taken_up():
        found = groups(ledger)
        began.setdefault(found[0][-1], time.time())
        return len(found) > 1 and found[1]

    try:
        wait_for(lambda: groups(ledger) and len(groups(ledger)[0]) > 20, driver, log, seconds=240)
        lost = random.choice(busy(site, "RayTrainWorker"))
        host, told = site.hosts[lost], time.time()
        if how == "SIGTERM":
            (node,) = (one for one in psutil.Process(host.process.pid).children(recursive=True) if is_node(one))
            node.terminate()
            wait_for(lambda: is_taken_up() or not node.is_running(), driver, log)
        else:
            tell_as_ec2_does(site, host, shared, datetime.fromtimestamp(told + EC2_NOTICE, UTC))
            wait_for(lambda: is_taken_up() or time.time() > told + EC2_NOTICE, driver, log)
            host.power_off()
        there = time.time() - told
        wait_for(is_taken_up, driver, log)
        old, new = groups(ledger)
        seconds = began[old[-1]] - began[min(step for step in began if step >= new[0])]
        print(f"{how}: node{lost} went after {there:.0f} s, steps {new[0]} to {old[-1]} were lost: {seconds:.1f} s")
        assert (NOTICE if how == "SIGTERM" else EC2_NOTICE) - 5 < there
        assert seconds < 5, host.log.read_text()[-3000:]
        assert log.read_text().count("a node goes in ") == 1
    finally:
        psutil.Process(driver.pid).children()[0].terminate()
        code = driver.wait(120)
        for number, host in enumerate(site.hosts):
            if host.process is None:
                site.switch_on(number)
        site.wait_for_nodes(len(site.hosts))
    assert code == 143, log.read_text()[-3000:]


def is_node(process):
    return process.name() == "ray" and "--block" in process.cmdline()


def tell_as_ec2_does(site, host, shared, ends):
    """To who asks in the host, which the watcher of infra/aws does."""
    notice = shared / "notice.json"
    environment = {**site.environment, "AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:8169"}
    for program, *arguments in (("tests/infra/ec2_metadata.py", 8169, notice), ("infra/docker/spot_notice.py",)):
        command = host.inside(sys.executable, REPO / program, *arguments)
        with host.log.open("ab") as log:
            subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    told = {"action": "terminate", "time": f"{ends:%Y-%m-%dT%H:%M:%SZ}"}
    storage.publish_bytes(str(notice), json.dumps(told).encode())


# Sharding


@pytest.fixture(scope="module")
def images(shared):
    folder = shared / "raw"
    generate_photos(folder, 900, seed=5, size=144)
    return folder


def shard(site, images, output, log):
    command = [sys.executable, str(REPO / "pipelines" / "shard.py"), "--source", str(images), "--output", str(output)]
    command += ["--shard.short-side", "96", "--shard.min-side", "32", "--shard.target-mb", "0.06"]
    return site.drive(*command, log=log)


@pytest.fixture(scope="module")
def sharded(site, images, shared):
    log = shared / "shards.log"
    finish(shard(site, images, shared / "shards", log), log)
    return hashes_of(shared / "shards")


@pytest.mark.parametrize("run", range(RUNS))
@pytest.mark.parametrize("how", ["switched off", "cut off"])
def test_sharding_survives_a_lost_node_byte_for_byte(site, images, sharded, shared, how, run):
    output, log = shared / f"shard-{how[:3]}-{run}", shared / f"shard-{how[:3]}-{run}.log"
    began = time.monotonic()
    driver = shard(site, images, output, log)
    wait_for(lambda: len(list(output.glob("work/*/shard/*.parquet"))) > 5, driver, log)
    lost = random.choice([1, 2])
    time.sleep(random.uniform(0, 1))
    assert driver.poll() is None
    assert not list(output.glob("versions/*"))  # in the middle
    lose(site, lost, how)
    try:
        finish(driver, log)
        seconds = time.monotonic() - began
    finally:
        bring_back(site, lost, how)
    assert hashes_of(output) == sharded
    if seconds > 60:
        print(log.read_text()[-3000:])
    print(f"sharding, {how}: node{lost}, {seconds:.0f} s")


# Nodes that come, and nodes that are asked


REQUIRE = """
from adaconv.orchestration.cluster import connect
with connect():
    from adaconv.orchestration.cluster import require_resources
    require_resources(CPU=3)
    print("there are 3")
"""


def test_a_job_waits_for_nodes_that_come_and_else_is_refused(site, shared):
    site.hosts[2].power_off()
    site.wait_for_nodes(2)
    try:
        refused = site.drive(sys.executable, "-c", REQUIRE, log=shared / "refused.log")
        assert refused.wait(60) == 1
        assert "3 CPU needed, 2 in the cluster" in (shared / "refused.log").read_text()
        patient = ("env", "ADACONV_CLUSTER_PATIENCE=90", sys.executable, "-c", REQUIRE)
        waits = site.drive(*patient, log=shared / "waits.log")
        time.sleep(12)
        assert waits.poll() is None, (shared / "waits.log").read_text()
    finally:
        site.switch_on(2)
    assert waits.wait(90) == 0, (shared / "waits.log").read_text()
    site.wait_for_nodes(3)


def test_the_doctor_asks_every_node(site, shared):
    doctor = [sys.executable, str(REPO / "pipelines" / "doctor.py"), "--cluster", "--output", str(shared / "out")]
    log = shared / "doctor.log"
    driver = site.drive(*doctor, "--encoder-weights", "seeded:0", "--working-dir", str(REPO / "conf"), log=log)
    assert driver.wait(120) == 0, log.read_text()
    assert "3 nodes answer; Python" in log.read_text()
    for host in site.hosts:
        assert f"node {host.address} ({host.name}): " in log.read_text()
