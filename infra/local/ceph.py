"""An S3 server: Ceph's gateway on one monitor and one store, which is a file. Debian's packages, one copy of the data.

Run by itself, with S3_ACCESS_KEY and S3_SECRET_KEY in the environment, it is what the container of infra/compose does:

    python3 -m infra.local.ceph --folder /data --address 0.0.0.0 --port 9000 --bucket adaconv --bucket mlflow
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.local.processes import Running, StackError, binary, listens, run, start, stop

SERVICES = ("ceph-mon", "ceph-osd", "s3")
_STORE_BYTES = 20 * 2**30  # of a sparse file, at first; the store never grows beyond it

_CONF = """[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon}/0]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg autoscale mode = off
osd pool default pg num = 8
mon allow pool size one = true
osd crush chooseleaf type = 0
mon data avail crit = 1
ms bind msgr1 = false
ms bind ipv6 = false
ms bind port min = {first}
ms bind port max = {last}
run dir = {folder}/run
admin socket =
log file = {logs}/$name.log
log to stderr = false
mon cluster log file = {logs}/ceph.log
keyring = {folder}/$name.keyring
mon data = {folder}/mon
osd data = {folder}/osd
bluestore block size = {size}
osd memory target = 1073741824
rgw data = {folder}/rgw
rgw frontends = beast endpoint={address}:{s3}
"""


@dataclass(frozen=True)
class Site:
    """Where it lies and listens: S3 at `address` and `port`; Ceph itself on loopback, from `inner_port` on."""

    folder: Path
    logs: Path
    port: int
    inner_port: int
    environment: Mapping[str, str]
    address: str = "127.0.0.1"
    store_bytes: int = _STORE_BYTES

    def start(self, name: str) -> Running:
        """One of SERVICES, in that order; the first start of each sets it up.

        Raises:
            StackError: a program is missing, or it did not come up.
        """
        if name == "ceph-mon":
            if not (self.folder / "mon" / "keyring").exists():
                self._make_monitor()
            command = [binary("ceph-mon"), "-i", "a"]
        elif name == "ceph-osd":
            if not (self.folder / "osd" / "ready").exists():
                self._make_store()
            command = [binary("ceph-osd"), "-i", "0"]
        else:
            keyring = self.folder / "client.rgw.keyring"
            if not keyring.exists():
                caps = ("mon", "allow rw", "osd", "allow rwx")
                keyring.write_text(self._ask("auth", "get-or-create", "client.rgw", *caps))
            command = [binary("radosgw"), "-n", "client.rgw"]
        return start(
            name,
            [*command, "--foreground"],
            log=self.logs / f"{name}.log",
            environment=self._environment,
            answers=(lambda: listens(self.port)) if name == "s3" else lambda: self._answers(name),
        )

    def make_user(self, name: str, *, access_key: str = "", secret_key: str = "") -> tuple[str, str]:
        """A user's keys, made by Ceph where none are given."""
        admin = [binary("radosgw-admin"), "-n", "client.rgw", "user"]
        given = ["--access-key", access_key, "--secret-key", secret_key] if access_key else []
        made = run(
            [*admin, "create", "--uid", name, "--display-name", name, *given],
            environment=self._environment,
        )
        (keys,) = json.loads(made[made.index("{") :])["keys"]
        return keys["access_key"], keys["secret_key"]

    @property
    def _environment(self) -> dict[str, str]:
        return {**self.environment, "CEPH_CONF": str(self.folder / "ceph.conf")}

    def _ask(self, *arguments: str, text: str = "") -> str:
        ceph = [binary("ceph"), "--name", "client.admin", "--connect-timeout", "10"]
        return run([*ceph, *arguments], environment=self._environment, text=text)

    def _answers(self, name: str) -> bool:
        try:
            status = json.loads(self._ask("status", "--format", "json"))
        except StackError:
            return False
        return bool(name == "ceph-mon" or status["osdmap"]["num_up_osds"] == 1)

    def _make_monitor(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("", "run", "mon", "osd", "rgw"):
            (self.folder / name).mkdir(mode=0o700)
        fsid = str(uuid.uuid4())
        conf = _CONF.format(
            fsid=fsid,
            mon=self.inner_port,
            first=self.inner_port + 1,
            last=self.inner_port + 9,
            folder=self.folder,
            logs=self.logs,
            size=self.store_bytes,
            address=self.address,
            s3=self.port,
        )
        (self.folder / "ceph.conf").write_text(conf)
        tool = binary("ceph-authtool")
        mon, admin = self.folder / "mon.keyring", self.folder / "client.admin.keyring"
        for keyring, who, caps in ((mon, "mon.", ["mon"]), (admin, "client.admin", ["mon", "osd", "mgr"])):
            allowed = [part for cap in caps for part in ("--cap", cap, "allow *")]
            run([tool, "--create-keyring", keyring, "--gen-key", "-n", who, *allowed], environment=self._environment)
        run([tool, mon, "--import-keyring", admin], environment=self._environment)
        monmap = str(self.folder / "monmap")
        address = f"[v2:127.0.0.1:{self.inner_port}]"
        make = [binary("monmaptool"), "--create", "--addv", "a", address, "--fsid", fsid, monmap]
        run(make, environment=self._environment)
        mkfs = ["--mkfs", "-i", "a", "--monmap", monmap, "--keyring", str(mon)]
        run([binary("ceph-mon"), *mkfs], environment=self._environment)
        mon.replace(self.folder / "mon.a.keyring")

    def _make_store(self) -> None:
        identity = str(uuid.uuid4())
        made = run([binary("ceph-authtool"), "--gen-print-key"], environment=self._environment).strip()
        self._ask("osd", "new", identity, "-i", "-", text=json.dumps({"cephx_secret": made}))
        (self.folder / "osd.0.keyring").write_text(f"[osd.0]\n\tkey = {made}\n")
        mkfs = ["-i", "0", "--mkfs", "--osd-uuid", identity]
        run([binary("ceph-osd"), *mkfs], environment=self._environment)


def make_buckets(names: Sequence[str], environment: Mapping[str, str]) -> None:
    """Buckets that forget uploads which nobody finishes: a killed writer leaves one, and it costs.

    Args:
        names: of those that should be there.
        environment: AWS_ENDPOINT_URL and the two keys.
    """
    import boto3
    from botocore.exceptions import ClientError

    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )
    there = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    rule: dict[str, Any] = {"ID": "unfinished", "Status": "Enabled", "Filter": {"Prefix": ""}}
    rule["AbortIncompleteMultipartUpload"] = {"DaysAfterInitiation": 1}
    for name in names:
        try:
            if name not in there:
                client.create_bucket(Bucket=name)
            client.put_bucket_lifecycle_configuration(Bucket=name, LifecycleConfiguration={"Rules": [rule]})
        except ClientError as error:
            raise StackError(f"the S3 server does not make bucket {name}: {error}") from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--address", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--inner-port", type=int, default=9010)
    parser.add_argument("--store-gb", type=int, default=_STORE_BYTES // 2**30)
    parser.add_argument("--bucket", action="append", default=[])
    flags = parser.parse_args()
    access, secret = os.environ["S3_ACCESS_KEY"], os.environ["S3_SECRET_KEY"]
    logs = flags.folder / "logs"
    logs.mkdir(exist_ok=True)
    site = Site(
        folder=flags.folder / "ceph",
        logs=logs,
        port=flags.port,
        inner_port=flags.inner_port,
        environment={"PATH": os.environ["PATH"], "HOME": str(flags.folder)},
        address=flags.address,
        store_bytes=flags.store_gb * 2**30,
    )
    asked_to_end: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _: asked_to_end.append(got))
    running: list[Running] = []
    try:
        running += [site.start(name) for name in SERVICES]
        noted = flags.folder / "user-made"
        if not noted.exists():
            site.make_user("adaconv", access_key=access, secret_key=secret)
            noted.touch()
        endpoint = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{flags.port}"}
        make_buckets(flags.bucket, {**endpoint, "AWS_ACCESS_KEY_ID": access, "AWS_SECRET_ACCESS_KEY": secret})
        print(f"S3 at {flags.address}:{flags.port}, buckets {flags.bucket}", flush=True)
        while not asked_to_end and all(one.process() for one in running):
            time.sleep(1)
    except StackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        for one in reversed(running):
            stop(one)
    return 0 if asked_to_end else 1


if __name__ == "__main__":
    sys.exit(main())
