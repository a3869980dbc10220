"""Hosts of one machine: each a network namespace with its own processes, hostname, shared memory and /tmp.

They are joined by a bridge in a namespace of its own; nothing is seen from outside. A host's first process can be
killed, which is its power cut, and its cable can be pulled, which tells nobody.
"""

import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

RAY = Path(sys.executable).with_name("ray")
PORT = 6379

# Loss of a node is noticed within seconds rather than Ray's half a minute.
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    # A cut cable answers nothing at all: what waits for an answer asks whether the other is there.
    "RAY_grpc_client_keepalive_time_ms": "10000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
}


def can_make_hosts():
    return os.geteuid() == 0 and all(shutil.which(name) for name in ("ip", "unshare", "nsenter"))


def _run(*command):
    subprocess.run([*map(str, command)], check=True, capture_output=True, text=True)


class Host:
    """A machine with one address; its first process is `process`."""

    def __init__(self, site: str, number: int, folder: Path) -> None:
        self.name, self.address = f"node{number}", f"10.77.0.{number + 1}"
        self.namespace, self._switch, self._port = f"{site}-{number}", f"{site}-sw", f"p{number}"
        self.log = folder / f"{self.name}.log"
        self.process: subprocess.Popen | None = None
        _run("ip", "netns", "add", self.namespace)
        _run(
            "ip", "-n", self.namespace, "link", "add", "eth0", "type", "veth", "peer", self._port, "netns", self._switch
        )
        _run("ip", "-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run("ip", "-n", self.namespace, "link", "set", device, "up")
        _run("ip", "-n", self._switch, "link", "set", self._port, "master", "br0")
        self.plug(True)

    def start(self, command: str, environment: dict[str, str]) -> None:
        """Switch the machine on: this is all that it runs."""
        inside = (
            f"hostname {self.name}; mount -t tmpfs none /tmp; mount -t tmpfs none /dev/shm; "
            f"echo '127.0.0.1 localhost\n{self.address} {self.name}' > /tmp/hosts; mount --bind /tmp/hosts /etc/hosts; "
            f"exec {command}"
        )
        apart = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--uts", "--ipc", "--mount-proc")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *apart, "bash", "-c", inside],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def inside(self, *command: str) -> list[str]:
        """A command line that runs in the machine."""
        deadline = time.monotonic() + 10
        while not (first := psutil.Process(self.process.pid).children()):
            assert time.monotonic() < deadline, self.log.read_text()[-2000:]
            time.sleep(0.02)
        return ["nsenter", "--target", str(first[0].pid), "--all", "--", *map(str, command)]

    def power_off(self) -> None:
        """At once: nothing is flushed and nobody is told."""
        if self.process:
            self.process.kill()
            self.process.wait(20)
            self.process = None

    def plug(self, plugged: bool) -> None:
        """The cable in, or out: packets are lost, connections stay open."""
        _run("ip", "-n", self._switch, "link", "set", self._port, "up" if plugged else "down")


class Site:
    """A head and two workers of one CPU each, as one Ray cluster with a token."""

    def __init__(self, folder: Path, environment: dict[str, str], workers: int = 2) -> None:
        self._name = f"ac{secrets.token_hex(2)}"
        _run("ip", "netns", "add", f"{self._name}-sw")
        _run("ip", "-n", f"{self._name}-sw", "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", f"{self._name}-sw", "link", "set", "br0", "up")
        self.hosts = [Host(self._name, number, folder) for number in range(workers + 1)]
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "MLFLOW_"))},
            **QUICK,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(20),
            "RAY_USAGE_STATS_ENABLED": "0",
            "GLOO_SOCKET_IFNAME": "eth0",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **environment,
        }
        self.driver_environment = {**self.environment, "RAY_ADDRESS": f"{self.head.address}:{PORT}"}
        try:
            for number in range(len(self.hosts)):  # one by one: Ray gives each half a minute, on a busy machine too
                self.switch_on(number)
                self.wait_for_nodes(number + 1)
        except BaseException:
            self.close()
            raise

    @property
    def head(self) -> Host:
        return self.hosts[0]

    def switch_on(self, number: int) -> None:
        host = self.hosts[number]
        command = [str(RAY), "start", "--block", "--disable-usage-stats", "--node-ip-address", host.address]
        command += ["--object-store-memory", "120000000"]
        if number == 0:
            command += ["--head", "--port", str(PORT), "--num-cpus", "1", "--include-dashboard", "false"]
        else:
            command += ["--address", f"{self.head.address}:{PORT}", "--num-cpus", "1"]
        line = shlex.join(command)
        if number:  # a supervisor, as every deployment has: a node that left comes back when it can
            line = f"bash -c {shlex.quote(f'while true; do {line}; sleep 1; done')}"
        host.start(line, self.environment)

    def drive(self, *command: str, log: Path) -> subprocess.Popen:
        """Start a driver on the head."""
        with log.open("wb") as output:
            return subprocess.Popen(
                self.head.inside(*command), env=self.driver_environment, stdout=output, stderr=subprocess.STDOUT
            )

    def nodes(self) -> int:
        """How many the cluster takes for alive; 0 while it does not answer."""
        code = "import ray; ray.init(log_to_driver=False); print('alive', sum(n['Alive'] for n in ray.nodes()))"
        try:
            done = subprocess.run(
                self.head.inside(sys.executable, "-c", code),
                env=self.driver_environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
        except subprocess.TimeoutExpired:
            return 0
        found = re.search(r"alive (\d+)", done.stdout)  # Ray's own lines may follow it
        return int(found[1]) if found else 0

    def wait_for_nodes(self, number: int, *, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while (found := self.nodes()) != number:
            logs = "\n".join(host.log.read_text()[-1500:] for host in self.hosts if host.log.exists())
            assert time.monotonic() < deadline, f"{found} of {number} nodes\n{logs}"
            time.sleep(0.5)

    def close(self) -> None:
        for host in reversed(self.hosts):
            host.power_off()
            _run("ip", "netns", "del", host.namespace)
        _run("ip", "netns", "del", f"{self._name}-sw")
