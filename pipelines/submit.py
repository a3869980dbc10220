"""Run a pipeline as a job of a Ray cluster: `ray job submit` with what it does not check.

    python pipelines/submit.py --address http://127.0.0.1:8265 -- python pipelines/train.py --config ...

The working directory is measured before it is sent, its commit and what differs from it go along, and a stopped job
gets the time to write a checkpoint.
Relative paths mean nothing on the cluster: give absolute ones or s3://.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaconv import cli, ctrl_c
from adaconv.config.base import refuse_password, refuse_secret
from adaconv.config.submit import SubmitConfig
from adaconv.errors import JobError, UsageError


def command(config: SubmitConfig, entrypoint: Sequence[str], *, variables: Mapping[str, str]) -> list[str]:
    """The `ray job submit` that does it, with more variables for the job's environment."""
    if not entrypoint:
        raise UsageError("expected the job's command after --, as in: -- python pipelines/train.py --config FILE ...")
    try:
        for before, argument in zip(("", *entrypoint), entrypoint, strict=False):
            if not re.match(r"--tracking[._-]uri", argument if argument.startswith("--") else before):
                refuse_secret(argument)  # also a user's name, which a server may be given with
            refuse_password(argument)
    except ValueError as error:
        raise UsageError(f"the job's command: {error}") from None
    cli.require_directory(config.working_dir, "--working-dir")
    environment = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(config.stop_wait_seconds), **variables}}
    return [
        *(str(Path(sys.executable).with_name("ray")), "job", "submit", "--working-dir", config.working_dir),
        *("--runtime-env-json", json.dumps(environment)),
        *(("--address", config.address) if config.address else ()),
        *(() if config.wait else ("--no-wait",)),
        *("--", *entrypoint),
    ]


class _NoLongerFollowed(JobError):
    exit_code = ctrl_c.EXIT_CODE


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    entrypoint = given[cut + 1 :]

    def variables(config: SubmitConfig) -> dict[str, str]:
        from adaconv.tracking import provenance

        return provenance.variables(Path(config.working_dir) / "adaconv")

    def plan(config: SubmitConfig) -> str:
        short = {name: value for name, value in variables(config).items() if len(value) < 100}  # not the difference
        return shlex.join(command(config, entrypoint, variables=short))

    def execute(config: SubmitConfig) -> dict[str, Any]:
        from adaconv.orchestration.submission import refuse_too_large

        line = command(config, entrypoint, variables=variables(config))
        sent = refuse_too_large(Path(config.working_dir))
        try:
            done = subprocess.run(line, env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}, check=False)
        except KeyboardInterrupt:
            raise _NoLongerFollowed(
                "no longer followed; a job that was submitted goes on: `ray job list` shows it, `ray job stop ID` ends "
                "it, and the same command would submit another one"
            ) from None
        if done.returncode:
            raise JobError(f"the job ended with exit code {done.returncode}; its log is above")
        return {"working_dir_bytes": sent, "command": entrypoint}

    return cli.run(
        SubmitConfig,
        given[:cut],
        prog="pipelines/submit.py",
        doc=__doc__,
        plan=plan,
        execute=execute,
        output=lambda _: None,
    )


if __name__ == "__main__":
    sys.exit(main())
