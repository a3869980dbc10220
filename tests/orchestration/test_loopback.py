"""A local cluster, as every pipeline starts one where none is named, listens to this machine alone."""

import subprocess
import sys

import psutil
import pytest

ASK = """
import ray, sys
ray.init(log_to_driver=False)
@ray.remote
def work(): return "worked"
print(ray.get(work.remote()), flush=True)
sys.stdin.read()
"""


@pytest.mark.ray
def test_a_local_cluster_listens_on_loopback_alone(cluster):
    driver = subprocess.Popen(
        [sys.executable, "-c", ASK],
        env=cluster.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout.readline() == "worked\n"
    holder = psutil.Process(cluster._process.pid)
    pids = {driver.pid, holder.pid, *(child.pid for child in holder.children(recursive=True))}
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")
        for connection in psutil.net_connections("inet")
        if connection.pid in pids and connection.status == psutil.CONN_LISTEN
    }
    driver.communicate()
    assert listening == {"127.0.0.1"}
