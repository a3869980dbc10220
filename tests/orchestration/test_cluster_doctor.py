"""What `doctor --cluster` says of nodes, and that it says it of a real cluster."""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest

from adaconv.orchestration.cluster_doctor import NodeReport, _look, judged
from tests.servers import REPO

SOFTWARE = {"python": "3.11.7", "torch": "2.13.0", "ray": "2.60.0"}
GOOD = NodeReport("a", "10.0.0.1", SOFTWARE, 100.0, 99.0, 500.0, ("gpu0",), 1.0, "", "")


def said(*nodes):
    return [(finding.level, finding.what) for finding in judged(nodes, now=101.0)]


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
        ({"disk_free_gb": 9.9}, "note", "9.9 GB free"),
        ({"clock": 106.5}, "note", "clock is off"),  # five seconds after the last answer
        ({"clock": 93.5}, "note", "clock is off"),  # five seconds before it was asked
    ],
)
def test_the_node_that_differs_is_named(change, level, words):
    odd = replace(GOOD, address="10.0.0.3", **change)
    findings = said(GOOD, GOOD, odd)
    assert [(a, b) for a, b in findings if a != "ok"] == [(level, next(b for a, b in findings if a != "ok"))]
    assert any(words in what for _, what in findings)


@pytest.mark.parametrize(
    "change",
    [
        {"disk_free_gb": 10.0},
        {"clock": 105.5},
        {"clock": 94.5},
        {"gpus": (), "gpus_promised": 0.0},
        {"gpus_promised": 0.5},
    ],
)
def test_what_just_does_is_well(change):
    assert {level for level, _ in said(GOOD, replace(GOOD, address="10.0.0.3", **change))} == {"ok"}


def test_a_node_that_does_not_answer_fails():
    lost, there = said(GOOD, ("10.0.0.9", "timed out"))  # and nothing is said of all nodes
    assert lost == ("FAIL", "node 10.0.0.9 does not answer: timed out")
    assert there[0] == "ok"
    assert said() == []


def test_a_node_tells_what_it_cannot_use(tmp_path, monkeypatch):
    # MLflow writes what it was told to the environment, from where the next test's processes would take it.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    (tmp_path / "file").write_text("")
    look = partial(_look, gpus_promised=0.0, asked=1.0)
    report = look(str(tmp_path / "file" / "below"), "http://127.0.0.1:9")
    assert report.storage_error.startswith("NotADirectoryError: ")
    assert "http://127.0.0.1:9 does not answer" in report.tracking_error
    for uri in (None, f"sqlite:///{tmp_path}/file/mlflow.db"):  # a file is nobody's but the driver's
        report = look(str(tmp_path), uri)
        assert (report.storage_error, report.tracking_error) == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_real_cluster_is_looked_at(cluster, tmp_path):
    command = [sys.executable, str(REPO / "pipelines" / "doctor.py"), "--cluster", "--output", str(tmp_path)]
    command += ["--encoder-weights", "seeded:0", "--working-dir", str(tmp_path)]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 nodes answer; Python" in done.stdout
    assert not list(tmp_path.iterdir())  # it tried to write, and left nothing
