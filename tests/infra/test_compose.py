"""infra/compose against the Compose specification, and what it promises of ports, passwords and images."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import check_jsonschema
import jsonschema
import pytest
import yaml

REPO = Path(__file__).parents[2]
COMPOSE = REPO / "infra" / "compose"
SCHEMA = json.loads(
    (Path(check_jsonschema.__file__).parent / "builtin_schemas" / "vendor" / "compose-spec.json").read_text()
)


@pytest.fixture
def compose():
    return yaml.safe_load((COMPOSE / "compose.yaml").read_text())


def validate(document):
    jsonschema.validators.validator_for(SCHEMA)(SCHEMA).validate(document)


def test_the_file_is_valid(compose):
    validate(compose)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ((), "service"),
        (("services", "mlflow"), "depend_on"),
        (("services", "s3", "healthcheck"), "retry"),
        (("services", "ray-worker-gpu", "deploy", "resources"), "reservation"),
        (("configs", "mlflow-auth"), "contents"),
    ],
)
def test_a_misspelt_field_fails(compose, path, name):
    wrong = copy.deepcopy(compose)
    place = wrong
    for part in path:
        place = place[part]
    place[name] = {}
    with pytest.raises(jsonschema.ValidationError):
        validate(wrong)


def test_only_loopback_is_published(compose):
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 5
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert not [name for name, service in compose["services"].items() if service.get("network_mode")]


def test_every_service_has_a_check_and_a_pinned_image(compose):
    for name, service in compose["services"].items():
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+(\.\d+)?(-[\w${}:-]+)?", service["image"]), name
        assert service["cap_drop"] == ["ALL"], name
        if name != "mlflow-user":  # runs once
            assert service["healthcheck"]["test"][0] == "CMD", name
        for needed in service.get("depends_on", {}):
            assert needed in compose["services"], name


def test_no_password_is_in_the_file_and_none_has_a_default(compose):
    text = (COMPOSE / "compose.yaml").read_text()
    made = subprocess.run(
        [sys.executable, str(COMPOSE / "make_secrets.py")], capture_output=True, text=True, check=True
    ).stdout
    names = dict(line.split("=") for line in made.splitlines())
    assert len(set(names.values())) == len(names) == 8
    assert all(len(value) >= 40 for value in names.values())
    for name in names:
        uses = re.findall(r"\$\{" + name + r"([^}]*)\}", text)
        assert uses, name
        assert all(use.startswith(":?") for use in uses), f"{name} must be given"
    given = {
        key: value for service in compose["services"].values() for key, value in service.get("environment", {}).items()
    }
    secret = {key: value for key, value in given.items() if re.search("PASSWORD|SECRET|TOKEN|ACCESS_KEY", key)}
    assert len(secret) >= 8
    assert all(value.startswith("${") for value in secret.values())


def test_files_that_are_mounted_are_there(compose):
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("../"):
                assert (COMPOSE / source).exists(), source
        build = service.get("build")
        if build:
            assert (COMPOSE / build["context"] / build["dockerfile"]).exists()


def test_mlflow_admits_the_names_it_is_called_by(compose):
    (allowed,) = [part for part in compose["services"]["mlflow"]["command"] if part.startswith("--allowed-hosts=")]
    assert "mlflow:5000" in allowed
    assert compose["x-jobs"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"


def test_secrets_stay_out_of_git_and_of_images():
    ignored = subprocess.run(
        ["git", "check-ignore", "infra/compose/.env", "infra/compose/data/x.jpg", "secrets.env"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ignored.stdout.split() == ["infra/compose/.env", "infra/compose/data/x.jpg", "secrets.env"]
    lines = [line for line in (REPO / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    assert not [line for line in lines if line.startswith("!") and ("compose" in line or ".env" in line)]


def test_prometheus_has_ray_s_list_of_targets_where_ray_has_it(compose):
    """It is a link with an absolute path into the session's folder: at another place it leads nowhere."""
    mounts = [compose["services"][name]["volumes"] for name in ("ray-head", "prometheus")]
    (there,), (here,) = (
        [mount.split(":")[1] for mount in volumes if mount.startswith("ray-head:")] for volumes in mounts
    )
    assert there == here
    config = yaml.safe_load((REPO / "infra" / "monitoring" / "prometheus.yml").read_text())
    (targets,) = config["scrape_configs"][0]["file_sd_configs"][0]["files"]
    assert Path(targets).parent == Path(here)
