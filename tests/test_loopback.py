"""A local cluster, as every pipeline starts one where none is named, listens to this machine alone."""

import json
import subprocess
import sys

import psutil
import pytest

from tests.servers import ray_cluster

ASK = """
import ray
ray.init(log_to_driver=False)
@ray.remote
def work(): return "worked"
print(ray.get(work.remote()), flush=True)
import sys; sys.stdin.read()
"""


@pytest.mark.ray
def test_a_local_cluster_listens_on_loopback_alone():
    with ray_cluster({}) as cluster:
        driver = subprocess.Popen(
            [sys.executable, "-c", ASK],
            env=cluster.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert driver.stdout.readline() == "worked\n"
        pids = {cluster._process.pid, driver.pid}
        pids |= {child.pid for child in psutil.Process(cluster._process.pid).children(recursive=True)}
        listening = {
            connection.laddr.ip
            for connection in psutil.net_connections("inet")
            if connection.pid in pids and connection.status == psutil.CONN_LISTEN
        }
        driver.stdin.close()
        driver.wait(30)
    assert listening
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}, json.dumps(sorted(listening))
