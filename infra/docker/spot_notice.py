"""Drain this node of Ray when EC2 says that it takes the spot instance back, two minutes before it does.

    python infra/docker/spot_notice.py

Runs beside `ray start` (infra/aws/cluster.yaml), with the same token in its environment, and ends once Ray knows. On
Kubernetes nobody needs it: who evicts a pod ends it with SIGTERM, at which Ray drains by itself.
"""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

_POLL_SECONDS = 5  # as EC2's documentation has it
_ENDPOINT = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254")  # the variable of AWS's SDKs
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy's own metadata would answer


def ends_at() -> datetime | None:
    """When the instance is taken, if that is decided; by IMDSv2, which asks for a token first.

    Raises:
        OSError: the service does not answer, or refuses.
        ValueError: it answers something else.
    """
    token = _ask("PUT", "api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    try:
        answer = _ask("GET", "meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    except urllib.error.HTTPError as error:
        if error.code == 404:  # nothing is decided
            return None
        raise
    return datetime.fromisoformat(json.loads(answer)["time"])


def drain(ends: datetime) -> bool:
    """Whether Ray took it."""
    left = max(0, int((ends - datetime.now(UTC)).total_seconds()))
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--deadline-remaining-seconds", str(left)]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", f"EC2 takes it at {ends:%H:%M:%S}"]
    return subprocess.run(command, check=False).returncode == 0


def main() -> None:
    while True:
        try:
            ends = ends_at()
        except (OSError, ValueError, KeyError) as error:
            print(f"no answer of {_ENDPOINT}: {error!r}", flush=True)
            ends = None
        if ends and drain(ends):
            print(f"Ray drains this node, which goes at {ends}", flush=True)
            return
        time.sleep(_POLL_SECONDS)


def _ask(method: str, path: str, headers: dict[str, str]) -> str:
    request = urllib.request.Request(f"{_ENDPOINT}/latest/{path}", method=method, headers=headers)
    with _OPENER.open(request, timeout=2) as answer:
        return str(answer.read().decode())


if __name__ == "__main__":
    main()
