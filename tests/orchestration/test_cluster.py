"""A local cluster ends with its block, also where Ctrl-C comes while it starts; a cluster too small is refused."""

import subprocess
import sys

import pytest
import ray

from adaconv.errors import ClusterError, Interrupted
from adaconv.orchestration.cluster import connect, require_resources, require_workers

INTERRUPTED = """
import os, sys
from adaconv.orchestration import cluster
os.environ["RAY_AUTH_MODE"] = "disabled"
import ray

def init(_temp_dir, **_):
    raise KeyboardInterrupt

def shutdown():
    print("Ray ended,", len(os.listdir(sys.argv[1])), "entries in the folder")

folders = cluster.scratch_folder
cluster.scratch_folder = lambda what, _: folders(what, sys.argv[1])
ray.init, ray.shutdown = init, shutdown
try:
    with cluster.connect():
        pass
except KeyboardInterrupt:
    print("then", len(os.listdir(sys.argv[1])))
"""


def test_ctrl_c_while_it_starts_ends_it_before_its_folder_goes(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout == "Ray ended, 2 entries in the folder\nthen 0\n", done.stderr


def test_a_job_that_waits_in_vain_names_its_own_settings(monkeypatch):
    monkeypatch.delenv("ADACONV_CLUSTER_PATIENCE", raising=False)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(ray, "nodes", list)
    with pytest.raises(ClusterError, match=r"2 CPU needed, 1 in the cluster\. Lower --scaling\.num-actors or"):
        require_resources(CPU=2)
    with pytest.raises(ClusterError, match=r"there are no nodes\. Lower --scaling\.num-workers or"):
        require_workers(1, {"CPU": 1})


def test_a_sigterm_while_it_starts_is_no_failure_of_the_cluster(monkeypatch):
    def init(**_):
        raise Interrupted("stopped; the same command goes on")

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(Interrupted), connect():
        pass
