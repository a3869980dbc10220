"""What `doctor --cluster` says of nodes, and that it says it of a real cluster."""

import subprocess
import sys
from dataclasses import replace

import pytest

from adaconv.orchestration.cluster_doctor import NodeReport, judged
from tests.servers import REPO

SOFTWARE = {"python": "3.11.7", "torch": "2.13.0", "ray": "2.60.0"}
GOOD = NodeReport("a", "10.0.0.1", SOFTWARE, 100.0, 99.0, 500.0, ("gpu0",), 1.0, "", "")


def said(*nodes):
    return [(level, what) for level, what, _ in judged(nodes, now=101.0)]


def test_nodes_alike_are_well():
    assert {level for level, _ in said(GOOD, replace(GOOD, address="10.0.0.2"))} == {"ok"}


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({"software": {**SOFTWARE, "torch": "2.12.0"}}, "FAIL", "torch 2.12.0 (elsewhere 2.13.0)"),
        ({"storage_error": "PermissionError: no"}, "FAIL", "cannot use the output: PermissionError: no"),
        ({"tracking_error": "401"}, "FAIL", "10.0.0.3 (a): 401"),
        ({"gpus": ()}, "FAIL", "promises 1 GPUs and has 0"),
        ({"disk_free_gb": 2.0}, "note", "2.0 GB free"),
        ({"clock": 4000.0}, "note", "clock is off"),
    ],
)
def test_the_node_that_differs_is_named(change, level, words):
    odd = replace(GOOD, address="10.0.0.3", **change)
    findings = said(GOOD, GOOD, odd)
    assert [(a, b) for a, b in findings if a != "ok"] == [(level, next(b for a, b in findings if a != "ok"))]
    assert any(words in what for _, what in findings)


def test_a_node_that_does_not_answer_fails():
    assert said(GOOD, ("10.0.0.9", "timed out"))[0] == ("FAIL", "node 10.0.0.9 does not answer: timed out")


@pytest.mark.ray
def test_a_real_cluster_is_looked_at(cluster, tmp_path):
    command = [sys.executable, str(REPO / "pipelines" / "doctor.py"), "--cluster", "--output", str(tmp_path)]
    command += ["--encoder-weights", "seeded:0", "--working-dir", str(tmp_path)]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 nodes answer; Python" in done.stdout
    assert not list(tmp_path.iterdir())  # it tried to write, and left nothing
