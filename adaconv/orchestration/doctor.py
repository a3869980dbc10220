"""What the pipelines need, looked at one by one. A check yields findings; one that raises has failed."""

import importlib.metadata
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adaconv.config.doctor import DoctorConfig
from adaconv.orchestration.submission import REQUEST_LIMIT_BYTES, package_files

_REPO = Path(__file__).parents[2]


Level = Literal["ok", "note", "FAIL"]


@dataclass(frozen=True)
class Finding:
    level: Level
    what: str
    do: str = ""

    def __str__(self) -> str:
        return f"{self.level:4}  {self.what}" + (f" -> {self.do}" if self.do else "")


def python_and_packages(config: DoctorConfig) -> Iterator[Finding]:
    """The interpreter, and every pinned package against what is installed."""
    yield Finding("ok", f"Python {sys.version.split()[0]}")
    pins_file = _REPO / "constraints.txt"
    if not pins_file.exists():
        yield Finding("note", "constraints.txt is not here, so installed packages cannot be compared with the pins")
        return
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", pins_file.read_text(), re.MULTILINE))
    installed = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    different = [
        f"{name} {installed[name]} (pinned {pin})"
        for name, pin in pins.items()
        if name in installed and installed[name].partition("+")[0] != pin
    ]
    if different:
        yield Finding("note", f"other versions than tested: {', '.join(different)}", "make setup installs the pins")
    else:
        yield Finding("ok", f"{sum(name in installed for name in pins)} packages as pinned in constraints.txt")


def torch_and_devices(config: DoctorConfig) -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("ok", f"torch {torch.__version__}, {len(names)} CUDA devices: {', '.join(names)}")
    else:
        yield Finding(
            "note", f"torch {torch.__version__}, no CUDA device; {os.cpu_count()} cores", "training runs on CPUs"
        )


def ray_cluster(config: DoctorConfig) -> Iterator[Finding]:
    """The cluster that RAY_ADDRESS names, or that a local one starts."""
    from adaconv.errors import ClusterError
    from adaconv.orchestration.cluster import connect

    address = os.environ.get("RAY_ADDRESS")
    if address and address.startswith("http"):
        yield Finding("note", f"RAY_ADDRESS={address} is for ray job submit; pipelines need host:port or none")
        return
    try:
        with connect():
            import ray

            if config.cluster:
                yield from _nodes(config)
            resources = ray.cluster_resources()
            yield Finding(
                "ok",
                f"Ray {ray.__version__} at {address or 'a local cluster of its own'}: "
                f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs, {len(ray.nodes())} nodes",
            )
    except ClusterError as error:
        yield Finding("FAIL", str(error), "unset RAY_ADDRESS for a local cluster, or start one with ray start --head")


def _nodes(config: DoctorConfig) -> Iterator[Finding]:
    """Every node of the connected cluster."""
    from adaconv import storage
    from adaconv.errors import TrackingError
    from adaconv.orchestration import cluster_doctor
    from adaconv.tracking.runs import default_uri

    output = storage.absolute(config.output)
    uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    try:
        uri = default_uri(uri, Path(output)) if uri else None
    except TrackingError:  # `tracking` says what is wrong with it, without the password that may be
        uri = None
    with _left_as_it_was(output):
        found = list(cluster_doctor.reports(output=output, tracking_uri=uri))
    yield from cluster_doctor.judged(found, now=time.time())


def storage_of_output(config: DoctorConfig) -> Iterator[Finding]:
    """Write, read and remove a small file where jobs are to write."""
    from adaconv import storage

    folder = storage.absolute(config.output)
    is_new = storage.is_local(folder) and not os.path.exists(folder)
    began = time.monotonic()
    with _left_as_it_was(folder):
        error = storage_error(folder)
    if error:
        what = f"cannot use {config.output}: {error}"
        yield Finding("FAIL", what, "check permissions, credentials and AWS_ENDPOINT_URL, or use another store")
        return
    new = "is not there yet, and can be made and written to" if is_new else "is writable"
    where = f"{config.output} {new} (round trip {1000 * (time.monotonic() - began):.0f} ms)"
    if storage.is_local(config.output):
        there = next(one for one in (Path(folder), *Path(folder).parents) if os.path.exists(one))
        free_gb = shutil.disk_usage(there).free / 1e9
        level: Level = "ok" if free_gb > 10 else "note"
        yield Finding(level, f"{where}, {free_gb:.0f} GB free", "" if free_gb > 10 else "COCO and WikiArt take 30 GB")
    else:
        yield Finding("ok", where)


@contextmanager
def _left_as_it_was(folder: str) -> Iterator[None]:
    """Remove the folders that the block made: a mistyped path should not be there from now on."""
    from adaconv import storage

    local = (Path(folder), *Path(folder).parents) if storage.is_local(folder) else ()
    missing = [one for one in local if not os.path.exists(one)]  # Path's own raises where one may not look
    try:
        yield
    finally:
        for made in missing:
            with suppress(OSError):
                made.rmdir()


def storage_error(folder: str) -> str:
    """What goes wrong where a small file is written, read and removed; nothing if all is well."""
    from adaconv import storage

    probe = storage.join(folder, f".adaconv-doctor-{uuid.uuid4().hex[:8]}")
    try:
        storage.publish_bytes(probe, b"probe")
        back = storage.read_bytes(probe)
        storage.remove(probe)
    except Exception as error:  # whatever a store can answer
        return f"{type(error).__name__}: {error}"
    return "" if back == b"probe" else "gave back other bytes than were written"


def tracking(config: DoctorConfig) -> Iterator[Finding]:
    """The tracking backend answers; runs that dead processes left RUNNING are ended."""
    from adaconv.errors import TrackingError
    from adaconv.tracking.runs import client_of, database_file, default_uri, local_folder, ping, reap

    try:
        uri = default_uri(config.tracking_uri, local_folder(config.output))
        if (file := database_file(uri)) and not file.exists():
            yield Finding("ok", f"tracking: {uri} is made by the first run; one machine only, a server serves a team")
            return
        yield Finding("ok", f"tracking: {uri} answers, {ping(uri)} experiments")
        for dead in reap(client_of(uri)):
            said = f"run {dead.name} ({dead.run_id}) was left RUNNING and is FAILED now: {dead.why}"
            yield Finding("note", said, "the command that started it takes it up again")
    except TrackingError as error:
        yield Finding("FAIL", str(error), "start the server, or give --tracking-uri sqlite:////absolute/path.db")


def encoder_weights(config: DoctorConfig) -> Iterator[Finding]:
    """Whether the VGG-19 weights are at hand; nothing is downloaded."""
    from adaconv.errors import WeightsError
    from adaconv.model.encoder_weights import IMAGENET_URL, cached_file, require_source

    spec = config.encoder_weights
    try:
        require_source(spec)
    except WeightsError as error:
        yield Finding("FAIL", str(error), "give what --help of pipelines/train.py says of encoder.weights")
        return
    if spec.startswith("seeded:"):
        yield Finding("note", f"encoder weights {spec}: made on the spot, for tests and offline runs, not for quality")
        return
    path = cached_file(spec)
    if path.exists():
        yield Finding("ok", f"encoder weights {spec}: {path}")
    else:
        url = IMAGENET_URL if spec == "imagenet" else spec
        yield Finding(
            "note",
            f"encoder weights {spec} are not here; the first training downloads {url}",
            f"without internet, put the file at {path}, or train with --encoder.weights seeded:0 (not for quality)",
        )


def job_package(config: DoctorConfig) -> Iterator[Finding]:
    """What `ray job submit --working-dir` would send."""
    folder = Path(config.working_dir).expanduser()
    if not folder.is_dir():
        yield Finding("FAIL", f"--working-dir: expected a folder, found none at {folder}", "name what is to be sent")
        return
    files = package_files(folder)
    total = sum(files.values())
    what = (
        f"ray job submit --working-dir {config.working_dir} sends {len(files)} files, {total / 2**20:.1f} MiB unpacked"
    )
    if total > REQUEST_LIMIT_BYTES:
        largest = sorted(files, key=lambda name: -files[name])[:3]
        yield Finding(
            "FAIL", f"{what}; Ray takes {REQUEST_LIMIT_BYTES / 2**20:.0f} MiB", f"list in .gitignore: {largest}"
        )
    else:
        yield Finding("ok", what)


Check = Callable[[DoctorConfig], Iterator[Finding]]

CHECKS: tuple[Check, ...] = (
    python_and_packages,
    torch_and_devices,
    storage_of_output,
    tracking,
    encoder_weights,
    job_package,
    ray_cluster,
)


def examine(config: DoctorConfig, checks: Sequence[Check]) -> Iterator[Finding]:
    """What every check finds; what one did not foresee is a finding too, and keeps no other from its turn."""
    for check in checks:
        try:
            yield from check(config)
        except Exception as error:
            what, told = check.__name__.replace("_", " "), f"{type(error).__name__}: {error}".partition("\n")[0]
            yield Finding("FAIL", f"{what} could not be checked: {told}", "mend what it names")
