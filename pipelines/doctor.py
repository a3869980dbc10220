"""Check what the pipelines need: this machine, the cluster, storage, tracking and encoder weights.

    python pipelines/doctor.py --output s3://bucket/runs --tracking-uri http://127.0.0.1:5000

Each line is `ok`, `note` (works, but know this) or `FAIL` with what to do; exit code 1 if anything fails.
"""

import sys
from collections.abc import Sequence
from typing import Any

from adaconv import cli
from adaconv.config.doctor import DoctorConfig


def plan(config: DoctorConfig) -> str:
    from adaconv.orchestration.doctor import CHECKS

    return "\n".join(f"check {check.__name__.replace('_', ' ')}" for check in CHECKS)


def execute(config: DoctorConfig) -> dict[str, Any]:
    from adaconv.errors import JobError
    from adaconv.orchestration.doctor import CHECKS, examine

    findings = []
    for finding in examine(config, CHECKS):
        findings.append(finding)
        print(finding, flush=True)
    failed = [finding for finding in findings if finding.level == "FAIL"]
    if failed:
        raise JobError(f"{len(failed)} of {len(findings)} checks failed; each line above marked FAIL says what to do")
    return {"checks": len(findings), "notes": sum(finding.level == "note" for finding in findings)}


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(
        DoctorConfig, argv, prog="pipelines/doctor.py", doc=__doc__, plan=plan, execute=execute, output=lambda _: None
    )


if __name__ == "__main__":
    sys.exit(main())
