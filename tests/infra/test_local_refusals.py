"""What `python -m infra.local` refuses, and never touches; no server is started."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import psutil
import pytest

from infra.local import processes
from infra.local.__main__ import main
from infra.local.processes import Running, StackError, start, stop, write_private


def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years")
    assert main(["up", "--folder", str(tmp_path), "--base-port", "29400"]) == 1
    assert "found other files" in capsys.readouterr().err
    assert main(["down", "--purge", "--folder", str(tmp_path)]) == 0
    assert (tmp_path / "thesis.tex").read_text() == "years"


def test_taken_ports_are_named(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert main(["up", "--folder", str(tmp_path / "stack"), "--base-port", str(port - 3)]) == 1
    told = re.search(r"ports \[([\d, ]+)\] are taken; give another --base-port", capsys.readouterr().err)
    assert told
    assert str(port) in told[1].split(", ")  # beside it may stand what others of this machine have taken
    assert not (tmp_path / "stack").exists()


def test_all_programs_that_are_missing_are_named_before_any_server_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["up", "--folder", str(tmp_path / "stack"), "--base-port", "29500", "--prometheus"]) == 1
    told = capsys.readouterr().err
    assert re.search(r"expected the programs .*monmaptool, .*radosgw, .*prometheus, found none of that name", told)
    assert re.search("apt-get install --no-install-recommends ceph-base .*prometheus radosgw$", told.strip())
    assert not (tmp_path / "stack").exists()


def test_env_and_status_of_nothing(tmp_path, capsys):
    assert main(["env", "--folder", str(tmp_path / "none")]) == 1
    assert "no stack in" in capsys.readouterr().err
    assert main(["status", "--folder", str(tmp_path / "none")]) == 1


def test_private_files_are_private_from_the_start(tmp_path):
    write_private(tmp_path / "x", "one")
    write_private(tmp_path / "x", "two")
    assert (tmp_path / "x").read_text() == "two"
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600


_FORKS = """
import os, sys, time
if os.fork() == 0:
    open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(600)
"""


def started(folder, code=_FORKS, answers=None):
    child = folder / "child"
    command = [sys.executable, "-c", code, child]
    answers = answers or (lambda: child.exists() and child.read_text() != "")
    return start("ray", command, log=folder / "log", environment={}, answers=answers), child


def is_alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_what_a_killed_server_left_is_stopped_too(tmp_path):
    running, child = started(tmp_path)
    os.kill(running.pid, signal.SIGKILL)
    left = int(child.read_text())
    assert is_alive(left)
    stop(running)
    assert not is_alive(left)


@pytest.mark.parametrize("why", [KeyboardInterrupt, RuntimeError])
def test_a_server_that_is_waited_for_ends_with_the_wait(tmp_path, why):
    """Ctrl-C: nobody has noted it yet."""
    child = tmp_path / "child"

    def answers():
        if child.exists() and child.read_text():
            raise why
        return False

    with pytest.raises(why):
        started(tmp_path, answers=answers)
    assert not is_alive(int(child.read_text()))


def test_a_process_is_known_when_the_clock_was_set(tmp_path, monkeypatch):
    running, _ = started(tmp_path)
    boot_time, create_time = psutil.boot_time, psutil.Process.create_time
    monkeypatch.setattr(psutil, "boot_time", lambda: boot_time() + 60)
    monkeypatch.setattr(
        psutil.Process, "create_time", lambda process: create_time(process) + 60
    )  # as psutil reckons it
    assert running.process()
    stop(running)
    assert not is_alive(running.pid)


def test_a_secret_in_a_command_that_hangs_is_not_told(monkeypatch):
    monkeypatch.setattr(processes, "_RUN_SECONDS", 0.1)
    with pytest.raises(StackError, match=r"^python\S* did not end within 0.1 s$"):
        processes.run([sys.executable, "-c", "import time; time.sleep(60)", "--secret-key", "hunter2"], environment={})


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user")
def test_a_folder_of_another_user_is_not_trusted(tmp_path, capsys):
    """Who made it could say what is to be killed and removed."""
    folder = tmp_path / "stack"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    for action in ("up", "down", "status", "env"):
        assert main([action, "--folder", str(folder)]) == 1
        assert f"{folder} belongs to another user (65534)" in capsys.readouterr().err
    os.chown(folder, 0, 0)
    (folder / "stack.json").write_text("{}")
    os.chown(folder / "stack.json", 65534, 65534)
    assert main(["down", "--folder", str(folder)]) == 1


def test_a_stack_of_another_release_is_not_forgotten(tmp_path, capsys):
    noted = {"base_port": 1, "ray_folder": "/tmp/r", "running": {"s3": {"name": "s3", "pid": 1, "created": 1.7e9}}}
    (tmp_path / "stack.json").write_text(json.dumps(noted))
    (tmp_path / "secrets.json").write_text("{}")
    assert main(["down", "--folder", str(tmp_path)]) == 1
    assert "stack.json is another release's" in capsys.readouterr().err


def test_a_process_of_another_time_is_not_stopped():
    """Numbers of processes come again; the time of creation tells them apart."""
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    own = psutil.Process(sleeper.pid)
    created = own.create_time() - psutil.boot_time()
    for one in (Running("ray", own.pid, 1.0, processes._here()), Running("ray", own.pid, created, "another boot")):
        assert one.family() == []
        stop(one)
    assert sleeper.poll() is None
    assert Running("ray", own.pid, created, processes._here()).process()
    sleeper.communicate(b"\n")
