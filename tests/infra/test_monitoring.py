"""Dashboard, rules and Prometheus' configuration; what they ask for is what jobs count."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from infra.monitoring.dashboard import dashboard

MONITORING = Path(__file__).parents[2] / "infra" / "monitoring"
METRICS = Path(__file__).parents[2] / "adaconv" / "orchestration" / "metrics.py"
# Of Ray itself; the names that a node of 2.60 exports.
RAY = {f"ray_node_{name}" for name in ("cpu_utilization", "mem_used", "gpus_utilization", "disk_free", "disk_usage")}


def ours():
    """Names as Prometheus sees them: Ray puts its own before each, and counters end in _total."""
    named = re.findall(r'(Counter|Gauge)\(\s*"(\w+)"', METRICS.read_text())
    named += [("Gauge", name) for name in re.findall(r'\("(adaconv_train_\w+)",', METRICS.read_text())]
    return {f"ray_{name}" + ("_total" if kind == "Counter" else "") for kind, name in named}


def asked(text):
    return set(re.findall(r"ray_\w+", text))


def test_the_dashboards_file_is_what_its_code_prints():
    file = MONITORING / "grafana" / "dashboards" / "adaconv.json"
    assert json.loads(file.read_text()) == dashboard()


def test_panels_and_rules_ask_for_what_is_counted():
    queries = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    rules = [rule["expr"] for rule in yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"][0]["rules"]]
    everything = asked(" ".join(queries + rules))
    assert everything <= ours() | RAY
    assert ours() <= everything, "a metric that nobody looks at"


def test_panels_do_not_overlap_and_have_ids_of_their_own():
    panels = dashboard()["panels"]
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels) == len({panel["id"] for panel in panels})
    source = yaml.safe_load((MONITORING / "grafana/provisioning/datasources/prometheus.yml").read_text())
    assert {panel["datasource"]["uid"] for panel in panels} == {source["datasources"][0]["uid"]}


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs Debian's package prometheus")
def test_prometheus_takes_the_rules_and_they_fire_when_they_should():
    for command in (["check", "rules", "rules.yml"], ["test", "rules", "rules_test.yml"]):
        done = subprocess.run(["promtool", *command], cwd=MONITORING, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
