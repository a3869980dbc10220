"""Pipelines run as users run them, and what they leave."""

import hashlib
import subprocess
import sys

from adaconv import storage
from tests.servers import REPO


def command(source, output, *flags):
    recipe = ("--shard.short-side", 96, "--shard.min-side", 32, "--shard.target-mb", 0.06)
    told = ("--source", source, "--output", output, *recipe, "--scaling.num-workers", 2, *flags)
    return [sys.executable, str(REPO / "pipelines" / "shard.py"), *map(str, told)]


def shard(cluster, source, output, *flags, code=0):
    return run(cluster, command(source, output, *flags), code)


def dataset(cluster, *arguments, code=0):
    script = str(REPO / "pipelines" / "dataset.py")
    return run(cluster, [sys.executable, script, *map(str, arguments)], code)


def run(cluster, arguments, code):
    done = subprocess.run(arguments, env=cluster.environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stdout + done.stderr
    return done


def hashes_of(root) -> dict[str, str]:
    """The sha256 of every file that belongs to a version, by its path below the root."""
    return {
        entry.path: hashlib.sha256(storage.read_bytes(entry.uri)).hexdigest()
        for entry in storage.walk(str(root))
        if entry.path != "result.json"
    }
