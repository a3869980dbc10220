"""The services in the order in which they need one another, and what is known of those that run.

    PostgreSQL ─▶ MLflow ◀─ S3          clients ─▶ Ray (jobs) ─▶ MLflow, S3

FOLDER/stack.json has ports and processes, FOLDER/secrets.json (0600) passwords, made by the first `up` and kept.
"""

import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from infra.local import services
from infra.local.processes import PACKAGES, Running, StackError, require_programs, write_private

__all__ = ["Stack", "StackError"]

# Offsets from the base port. Ceph's own daemons follow behind.
_PORTS = ("postgres", "s3", "mlflow", "ray", "dashboard", "prometheus", "ray-agent")
# Whoever answers there is taken for the service.
_SERVES_AT = {name: name for name in ("postgres", "s3", "mlflow", "prometheus")} | {"ray": "dashboard"}


@dataclass(frozen=True)
class Place:
    """Where the stack is and what it is protected with: all that a service needs to know of the others."""

    folder: Path
    ray_folder: Path  # sockets below it: their paths may have 107 characters
    base_port: int
    secrets: dict[str, str]

    def port(self, name: str) -> int:
        return self.base_port + _PORTS.index(name)

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def environment(self, **more: str) -> dict[str, str]:
        """Of a server: nothing of the caller's but where programs and the home folder are."""
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "PATH", "TZ") if name in os.environ}
        return {**kept, "PATH": f"{Path(sys.executable).parent}:{kept.get('PATH', os.defpath)}", **more}

    def client_environment(self) -> dict[str, str]:
        """What users of the stack need, and the jobs on it."""
        return {
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.port('dashboard')}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.secrets["ray_token"],
            "RAY_USAGE_STATS_ENABLED": "0",
            # Read on every system, whatever its name says: one node alone, known as 127.0.0.1. Without it Ray takes the
            # machine's own address for 127.0.0.1, and all of its servers listen there.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{self.port('mlflow')}",
            "MLFLOW_TRACKING_USERNAME": "adaconv",
            "MLFLOW_TRACKING_PASSWORD": self.secrets["mlflow_user_password"],
            "MLFLOW_DISABLE_TELEMETRY": "true",
            **self.s3_environment(),
        }

    def s3_environment(self) -> dict[str, str]:
        if "s3_secret_key" not in self.secrets:
            raise StackError(f"the S3 server of {self.folder} was never up; see {self.logs}")
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port('s3')}",
            "AWS_ACCESS_KEY_ID": self.secrets["s3_access_key"],
            "AWS_SECRET_ACCESS_KEY": self.secrets["s3_secret_key"],
            "AWS_DEFAULT_REGION": "us-east-1",
            # Ceph 16 knows no checksums in trailers, which newer clients send by default.
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }


@dataclass
class Stack:
    """The stack in a folder, running or not."""

    folder: Path
    running: dict[str, Running] = field(default_factory=dict)
    place: Place | None = None

    def __post_init__(self) -> None:
        for path in (self.folder, self.folder / "stack.json"):
            if path.exists() and path.stat().st_uid != os.geteuid():  # who could say what is to be stopped and removed
                raise StackError(f"{path} belongs to another user ({path.stat().st_uid}); give another --folder")
        noted = self.folder / "stack.json"
        if noted.exists():
            told = json.loads(noted.read_text())
            passwords = json.loads((self.folder / "secrets.json").read_text())
            self.place = Place(self.folder, Path(told["ray_folder"]), told["base_port"], passwords)
            try:
                self.running = {name: Running(**one) for name, one in told["running"].items()}
            except TypeError:
                raise StackError(f"{noted} is another release's: `down` by the one that started the stack") from None

    def up(
        self,
        *,
        base_port: int,
        num_cpus: int | None = None,
        num_gpus: int | None = None,
        prometheus: bool = False,
        say: Callable[[str], None],
    ) -> None:
        """Start what is not running, each service when those it needs answer.

        Raises:
            StackError: a program is missing, a port is taken: nothing was started. Or a server did not start: what runs
                stays, and `down` ends it.
        """
        if self.place is None:
            self._refuse_what_is_taken(base_port)
        require_programs(name for name in PACKAGES if prometheus or name != "prometheus")
        place = self.place = self.place or self._make_place(base_port)
        wanted: dict[str, Callable[[], Running]] = {
            "postgres": lambda: services.start_postgres(place),
            "ceph-mon": lambda: services.start_s3(place, "ceph-mon"),
            "ceph-osd": lambda: services.start_s3(place, "ceph-osd"),
            "s3": lambda: services.start_s3(place, "s3"),
            "mlflow": lambda: services.start_mlflow(place),
            "ray": lambda: services.start_ray(place, num_cpus=num_cpus, num_gpus=num_gpus),
        }
        if prometheus:
            wanted["prometheus"] = lambda: services.start_prometheus(place)
        for name, start in wanted.items():
            if name in self.running:
                if self.running[name].process():
                    say(f"{name}: runs already")
                    continue
                services.stop_service(self.running[name])  # what a killed one left serves on
            services.refuse_taken_ports([place.port(_SERVES_AT[name])] if name in _SERVES_AT else [])
            self.running[name] = start()
            self._note()
            say(f"{name}: up, process {self.running[name].pid}")
        services.make_jobs_user(place)
        say(f"MLflow http://127.0.0.1:{place.port('mlflow')}, Ray dashboard http://127.0.0.1:{place.port('dashboard')}")
        say(f'eval "$(python -m infra.local env --folder {self.folder})"')

    def down(self, *, purge: bool, say: Callable[[str], None]) -> None:
        """Stop in the reverse order, so that nobody loses what it is about to write to."""
        for name in reversed(self.running):
            services.stop_service(self.running[name])
            say(f"{name}: stopped")
        self.running = {}
        if self.place:
            self._note()
            shutil.rmtree(self.place.ray_folder, ignore_errors=True)
        if purge and self.place:  # never a folder that is somebody else's
            shutil.rmtree(self.folder, ignore_errors=True)

    def status(self) -> dict[str, str]:
        if not self.running:
            return {"stack": f"nothing of {self.folder} runs"}
        return {name: f"process {one.pid}" if one.process() else "gone" for name, one in self.running.items()}

    def is_up(self) -> bool:
        return bool(self.running) and all(one.process() for one in self.running.values())

    def client_environment(self) -> dict[str, str]:
        if self.place is None:
            raise StackError(f"no stack in {self.folder}: python -m infra.local up --folder {self.folder}")
        return self.place.client_environment()

    def _refuse_what_is_taken(self, base_port: int) -> None:
        services.refuse_taken_ports(range(base_port, base_port + 20))
        if self.folder.exists() and any(self.folder.iterdir()):
            raise StackError(f"expected an empty folder, or one of an earlier `up`, found other files in {self.folder}")

    def _make_place(self, base_port: int) -> Place:
        self.folder.mkdir(parents=True, exist_ok=True)
        # Others may pass through, to the folder that belongs to PostgreSQL's user; they can list or read nothing.
        self.folder.chmod(0o711)
        (self.folder / "logs").mkdir(mode=0o700, exist_ok=True)
        passwords = {
            name: secrets.token_hex(20)
            for name in (
                *("postgres_password", "mlflow_admin_password", "mlflow_user_password", "mlflow_secret_key"),
                "ray_token",
            )
        }
        ray_folder = Path(tempfile.gettempdir()) / f"adaconv-ray-{secrets.token_hex(3)}"
        place = self.place = Place(self.folder, ray_folder, base_port, passwords)
        self._note()
        return place

    def _note(self) -> None:
        """Passwords first, for they are read wherever stack.json is there."""
        assert self.place
        write_private(self.folder / "secrets.json", json.dumps(self.place.secrets, indent=2))
        told: dict[str, Any] = {"base_port": self.place.base_port, "ray_folder": str(self.place.ray_folder)}
        told["running"] = {name: asdict(one) for name, one in self.running.items()}
        write_private(self.folder / "stack.json", json.dumps(told, indent=2))
