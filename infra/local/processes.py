"""Servers as processes: started apart from the terminal, waited for until they answer, stopped with their children."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

# The programs that are no part of this environment, and Debian's packages of them.
PACKAGES = {
    "initdb": "postgresql",
    "monmaptool": "ceph-base",
    "ceph": "ceph-common",
    "ceph-authtool": "ceph-common",
    "ceph-mon": "ceph-mon",
    "ceph-osd": "ceph-osd",
    "radosgw": "radosgw",
    "radosgw-admin": "radosgw",
    "prometheus": "prometheus",
}


_RUN_SECONDS = 120
_CHILDREN_SECONDS = 2  # to end with the process that started them


class StackError(Exception):
    """What went wrong, where the log is, and what to do."""


@dataclass(frozen=True)
class Running:
    """A process that was started, the first of a session of its own.

    `created` tells it from a later one with the same number: seconds after the boot, which do not change when the clock
    is set. `where` its number means this: a boot, and a container.
    """

    name: str
    pid: int
    created: float
    where: str

    def process(self) -> psutil.Process | None:
        if self.where != _here():
            return None
        try:
            process = psutil.Process(self.pid)
            same = self._is(process) and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return None
        return process if same else None

    def family(self) -> list[psutil.Process]:
        """What is left of it and of those that it started, which outlive it where it was killed."""
        found = []
        for process in psutil.process_iter() if self.where == _here() else ():
            with contextlib.suppress(psutil.Error, ProcessLookupError, PermissionError):
                if process.pid == self.pid and not self._is(process):
                    return []  # a number is given anew once nobody of its session is left
                if os.getsid(process.pid) == self.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        if first := self.process():
            with contextlib.suppress(psutil.Error):
                found += [child for child in first.children(recursive=True) if child not in found]
        return found

    def _is(self, process: psutil.Process) -> bool:
        return abs(_created(process) - self.created) < 0.05


def _here() -> str:
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _created(process: psutil.Process) -> float:
    return float(process.create_time() - psutil.boot_time())


def start(
    name: str,
    command: Sequence[str | Path | int],
    *,
    log: Path,
    environment: Mapping[str, str],
    answers: Callable[[], bool],
    user: str | None = None,
    patience_seconds: float = 120,
) -> Running:
    """Start a server and wait until it answers.

    Args:
        name: of the service.
        command: must stay in the foreground.
        log: its output is appended.
        environment: of the process, whole.
        answers: whether it serves.
        user: that it runs as; None is the caller.
        patience_seconds: until it must answer.

    Raises:
        StackError: it ended or did not answer in time; it is not left running.
    """
    with log.open("ab") as output:
        os.chmod(log, 0o600)
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(environment),
            cwd="/",
            user=user,
            extra_groups=[] if user else None,
            start_new_session=True,
        )
    running = Running(name, process.pid, _created(psutil.Process(process.pid)), _here())
    deadline = time.monotonic() + patience_seconds
    with stopped_if_it_fails(running):
        while not answers():
            code = process.poll()
            if code is not None or time.monotonic() > deadline:
                what = f"ended with {code}" if code is not None else f"did not answer within {patience_seconds:.0f} s"
                raise StackError(f"{name} {what}; the end of {log}:\n{tail(log)}")
            time.sleep(0.1)
    return running


@contextlib.contextmanager
def stopped_if_it_fails(running: Running) -> Iterator[None]:
    """Around what follows a start, until the process is noted: Ctrl-C too leaves none that nobody knows."""
    try:
        yield
    except BaseException:
        stop(running)
        raise


def stop(running: Running, *, patience_seconds: float = 20, ask: int = signal.SIGTERM) -> None:
    """Ask a process to end, then end what is left of it and its children."""
    family = running.family()
    if process := running.process():
        process.send_signal(ask)
        psutil.wait_procs([process], timeout=patience_seconds)
    _, alive = psutil.wait_procs(family, timeout=_CHILDREN_SECONDS)
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for one in alive:
            with contextlib.suppress(psutil.Error):
                end(one)
        _, alive = psutil.wait_procs(alive, timeout=5)


def run(
    command: Sequence[str | Path | int], *, environment: Mapping[str, str], user: str | None = None, text: str = ""
) -> str:
    """The output of a command that sets something up.

    Raises:
        StackError: it failed, and what it said; or it did not end.
    """
    try:
        done = subprocess.run(
            [str(part) for part in command],
            env=dict(environment),
            cwd="/",
            user=user,
            extra_groups=[] if user else None,
            input=text,
            capture_output=True,
            text=True,
            check=False,
            timeout=_RUN_SECONDS,
        )
    except subprocess.TimeoutExpired:  # whose text has the command with whatever secrets
        raise StackError(f"{Path(str(command[0])).name} did not end within {_RUN_SECONDS} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise StackError(f"{Path(str(command[0])).name} {' '.join(map(str, command[1:3]))} failed: {said}")
    return done.stdout


def binary(name: str) -> str:
    """Where one of PACKAGES' programs is.

    Raises:
        StackError: it is not installed; names Debian's package.
    """
    require_programs([name])
    found = _where(name)
    assert found
    return found


def require_programs(names: Iterable[str]) -> None:
    """Name all programs that are missing, before any is started, with what installs them.

    Raises:
        StackError: some are not installed.
    """
    missing = [name for name in names if not _where(name)]
    if missing:
        packages = sorted({PACKAGES[name] for name in missing})
        raise StackError(
            f"expected the programs {', '.join(missing)}, found none of that name; on Debian and Ubuntu: "
            f"apt-get install --no-install-recommends {' '.join(packages)}"
        )


def _where(name: str) -> str | None:
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)  # which Debian keeps off the PATH
    return shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", os.defpath)]))


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def tail(log: Path, *, size: int = 3000) -> str:
    return log.read_text(errors="replace")[-size:] if log.exists() else "(no log)"


def write_private(path: Path, text: str) -> None:
    """Write a file that nobody else may read, at any time."""
    aside = path.with_name(path.name + ".new")
    aside.unlink(missing_ok=True)
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    aside.replace(path)
