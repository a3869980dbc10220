"""infra/aws as Ray and EC2 would take it, without either."""

import copy
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import Mock

import boto3
import botocore.session
import jsonschema
import psutil
import pytest
import yaml
from botocore.validate import ParamValidator
from moto import mock_aws

from infra.docker import spot_notice
from tests.infra.ec2_metadata import Ec2Metadata

FILE = Path(__file__).parents[2] / "infra" / "aws" / "cluster.yaml"


@pytest.fixture
def config():
    return yaml.safe_load(FILE.read_text())


@pytest.fixture
def aws(monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    with mock_aws():
        yield boto3.client("ec2", region_name="eu-central-1")


def validated(config):
    from ray.autoscaler._private.util import prepare_config, validate_config

    whole = prepare_config(copy.deepcopy(config))
    validate_config(whole)
    return whole


def test_ray_takes_the_file(config):
    whole = validated(config)
    assert whole["head_node_type"] in whole["available_node_types"]


def test_docker_takes_every_option(config):
    """Flags are parsed before a daemon is looked for. Shared memory is left to Ray, which measures each node's."""
    options = config["docker"]["run_options"]
    assert not [option for option in options if "--shm-size" in option]
    for option in options if shutil.which("docker") else ():
        command = ["docker", "run", *shlex.split(option), "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
        assert done.returncode == 0, done.stderr


def test_the_image_installs_what_the_launcher_calls_within():
    """rsync puts its files into a container; the head's autoscaler reaches workers by ssh and rsync."""
    install = re.search(r"apt-get install (.*tini.*) \\", (FILE.parents[1] / "docker" / "Dockerfile").read_text())
    assert {"openssh-client", "rsync"} <= set(install[1].split())


@pytest.mark.parametrize("path", [("max_worker",), ("available_node_types", "cpu", "max_worker"), ("auth", "ssh_usr")])
def test_ray_refuses_a_misspelt_field(config, path):
    place = config
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = 1
    with pytest.raises(jsonschema.ValidationError):
        validated(config)


def problems(node_config):
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    return ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **node_config}, shape).generate_report()


def test_ec2_takes_every_node(config):
    for name, node in config["available_node_types"].items():
        assert not problems(node["node_config"]), name


def test_ec2_refuses_a_misspelt_field(config):
    node = config["available_node_types"]["gpu-spot"]["node_config"]
    assert "Unknown parameter" in problems({**node, "InstanceTyp": "g6e.4xlarge"})
    assert "SpotInstanceTyp" in problems({**node, "InstanceMarketOptions": {"SpotOptions": {"SpotInstanceTyp": "x"}}})


def test_gpu_nodes_are_known_as_such(config, aws):
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    logging.getLogger("botocore").setLevel(logging.ERROR)
    filled = AWSNodeProvider.fillout_available_node_types_resources(validated(config))["available_node_types"]
    assert filled["head"]["resources"]["CPU"] == 0
    for name in ("gpu-spot", "gpu-ondemand"):
        assert (filled[name]["resources"]["GPU"], filled[name]["resources"]["CPU"]) == (1, 16)
        assert "accelerator_type:L40S" in filled[name]["resources"]
    assert "GPU" not in filled["cpu"]["resources"]


def test_ray_up_reaches_the_head_from_outside(config, aws):
    """By an address that its subnet gives it; workers are reached by the head, by their private ones."""
    from ray.autoscaler._private.aws.config import _configure_subnet
    from ray.autoscaler._private.updater import NodeUpdater

    provider = Mock()
    given = {"provider_config": config["provider"], "provider": provider, "auth_config": config["auth"]}
    commands = {"initialization_commands": [], "setup_commands": [], "ray_start_commands": []}
    hashes = {"file_mounts": {}, "runtime_hash": "", "file_mounts_contents_hash": ""}
    NodeUpdater(node_id="i-0", cluster_name="adaconv", is_head_node=True, **given, **commands, **hashes)
    (*_, use_internal_ip, _docker) = provider.get_command_runner.call_args.args
    assert not use_internal_ip
    private = aws.describe_subnets()["Subnets"][0]["SubnetId"]
    aws.modify_subnet_attribute(SubnetId=private, MapPublicIpOnLaunch={"Value": False})
    head = _configure_subnet(validated(config))["available_node_types"]["head"]["node_config"]
    assert head["SubnetIds"]
    assert private not in head["SubnetIds"]


def test_the_notice_of_a_spot_instance_is_read(tmp_path, monkeypatch):
    notice = tmp_path / "notice.json"
    with Ec2Metadata(0, notice) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(spot_notice, "_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # not asked
        with pytest.raises(urllib.error.HTTPError, match="401"):
            spot_notice._ask("GET", "meta-data/spot/instance-action", {})
        assert spot_notice.ends_at() is None
        notice.write_text('{"action": "terminate", "time": "2026-09-18T08:22:00Z"}')
        assert spot_notice.ends_at() == datetime(2026, 9, 18, 8, 22, tzinfo=UTC)
        notice.write_text("<html>")
        with pytest.raises(ValueError, match="Expecting value"):
            spot_notice.ends_at()
        server.shutdown()
    with pytest.raises(OSError, match="refused"):
        spot_notice.ends_at()


def test_every_worker_watches_for_notices_beside_ray(config, tmp_path):
    """As Ray's launcher runs the line, which it does again on each `ray up`: it ends at once, one watcher stays."""
    watcher = tmp_path / "watcher.py"
    watcher.write_text("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    line = config["worker_start_ray_commands"][-1].replace("/opt/adaconv-secrets/secrets.env", "/dev/null")
    line = line.replace("/tmp/", f"{tmp_path}/").replace("/opt/adaconv/infra/docker/spot_notice.py", str(watcher))
    command = ["bash", "-c", f"ray() {{ echo ray $1 $2; }}; export RAY_HEAD_IP=head; ({line})"]
    log, pids = tmp_path / "spot-notice.log", []
    try:
        for _ in range(2):
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
            assert done.stdout.strip() == "ray start --address=head:6379"
            deadline = time.monotonic() + 20
            while not pids and time.monotonic() < deadline:
                time.sleep(0.05)
                pids = [int(word) for word in log.read_text().split()]
        time.sleep(0.5)
        lines = {one.pid: one.info["cmdline"] or [""] for one in psutil.process_iter(["cmdline"])}
        programs = {pid: Path(line[0]).name for pid, line in lines.items() if line[-1] == str(watcher)}
        assert [pid for pid, name in programs.items() if name.startswith("python")] == pids
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


def test_all_nodes_have_one_image(config):
    """Ray refuses a node whose Python is not the head's to the last number, and bases bring their own."""
    types = config["available_node_types"].values()
    named = [config["docker"], *(node["docker"] for node in types if "docker" in node)]
    (image,) = {name for place in named for key, name in place.items() if key.endswith("image")}
    assert image.endswith("-cuda")


def test_spot_is_spot_and_the_head_is_not(config):
    types = config["available_node_types"].items()
    markets = {name: "InstanceMarketOptions" in node["node_config"] for name, node in types}
    assert markets == {"head": False, "cpu": False, "gpu-spot": True, "gpu-ondemand": False}


def test_nodes_are_closed(config):
    """No open ports, no role with all rights, metadata by token alone, encrypted disks, the dashboard on loopback."""
    assert config["provider"]["security_group"]["IpPermissions"] == []
    assert all("--dashboard-host=127.0.0.1" in line for line in config["head_start_ray_commands"] if "--head" in line)
    for node in config["available_node_types"].values():
        assert node["node_config"]["IamInstanceProfile"]["Name"].startswith("adaconv-ray-")
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in node["node_config"]["BlockDeviceMappings"])
