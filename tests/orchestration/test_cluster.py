"""A local cluster ends with its block, also where Ctrl-C comes while it starts."""

import subprocess
import sys

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
