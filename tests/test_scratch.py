"""Folders of processes that are gone."""

import os
import signal
import subprocess
import sys
import time

from adaconv import scratch
from adaconv.scratch import scratch_folder

_HOLD = """
import sys, time
from adaconv.scratch import scratch_folder
with scratch_folder("tiles", sys.argv[1]) as folder:
    (folder / "map").write_bytes(bytes(1000))
    print(folder, flush=True)
    time.sleep(600)
"""


def holder(parent):
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(parent)], stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def age(parent):
    """As if everything had been made two minutes ago, and nobody had looked since."""
    for path in parent.iterdir():
        os.utime(path, times=(time.time() - 120,) * 2)
    scratch._swept.clear()


def test_a_folder_is_gone_with_its_block(tmp_path):
    with scratch_folder("x", tmp_path) as folder:
        (folder / "file").write_text("a")
        assert folder.parent == tmp_path
    assert not list(tmp_path.iterdir())


def test_the_folder_around_it_is_made_where_it_is_missing(tmp_path):
    with scratch_folder("x", tmp_path / "disk" / "scratch") as folder:
        assert folder.parent == tmp_path / "disk" / "scratch"


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    dead, left = holder(tmp_path)
    alive, kept = holder(tmp_path)
    (tmp_path / "adaconv-ray-abc").mkdir()  # without a lock: another program's
    try:
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        with scratch_folder("x", tmp_path):
            assert os.path.exists(left)  # it may have been made a moment ago
        age(tmp_path)
        with scratch_folder("x", tmp_path):
            pass
        assert not os.path.exists(left)
        assert os.path.exists(f"{kept}/map")
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            ["adaconv-ray-abc", os.path.basename(kept), f"{os.path.basename(kept)}.lock"]
        )
    finally:
        alive.kill()
        alive.wait()


def test_a_lock_of_somebody_else_names_nothing_that_is_removed(tmp_path, monkeypatch):
    """Anybody can put `adaconv-runs-UID.lock` into /tmp, beside the folder that is kept there."""
    (tmp_path / "adaconv-runs-0").mkdir()
    (tmp_path / "adaconv-runs-0.lock").touch()
    age(tmp_path)
    with scratch_folder("x", tmp_path):
        pass
    assert not (tmp_path / "adaconv-runs-0").exists()  # ours is swept, which makes the rest a test
    (tmp_path / "adaconv-runs-0").mkdir()
    (tmp_path / "adaconv-runs-0.lock").touch()
    age(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with scratch_folder("x", tmp_path):
        pass
    assert (tmp_path / "adaconv-runs-0").exists()
