"""What `python -m infra.local` refuses, and never touches; no server is started."""

import re
import socket
import subprocess
import sys

from infra.local.__main__ import main
from infra.local.processes import Running, stop, write_private


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


def test_a_process_of_another_time_is_not_stopped():
    """Numbers of processes come again; the time of creation tells them apart."""
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    stop(Running("ray", sleeper.pid, created=1.0))
    assert sleeper.poll() is None
    sleeper.communicate(b"\n")
