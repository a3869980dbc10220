"""The whole stack on one machine, without containers: PostgreSQL, S3, MLflow and Ray, with passwords, on loopback.

    python -m infra.local up
    eval "$(python -m infra.local env)"
    python -m infra.local status
    python -m infra.local down

`up` returns when everything answers; run again, it starts what is not running. What is stored stays in the folder
until `down --purge`.
"""

import argparse
import shlex
import sys
from pathlib import Path

from infra.local.stack import Stack, StackError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m infra.local", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["up", "down", "status", "env"])
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp/adaconv-stack"), help="data, logs and secrets")
    parser.add_argument(
        "--base-port", type=int, default=18200, help="first of 20 ports in a row; kept from the first `up` on"
    )
    parser.add_argument("--num-cpus", type=int, help="of the Ray node; default: the cores, at least 4")
    parser.add_argument("--num-gpus", type=int, help="of the Ray node; default: those found")
    parser.add_argument("--prometheus", action="store_true", help="start Prometheus too")
    parser.add_argument("--purge", action="store_true", help="with down: delete the folder")
    flags = parser.parse_args(argv)
    try:
        stack = Stack(flags.folder.absolute())
        if flags.action == "up":
            stack.up(
                base_port=flags.base_port,
                num_cpus=flags.num_cpus,
                num_gpus=flags.num_gpus,
                prometheus=flags.prometheus,
                say=lambda line: print(line, flush=True),
            )
        elif flags.action == "down":
            stack.down(purge=flags.purge, say=lambda line: print(line, flush=True))
        elif flags.action == "status":
            for name, answer in stack.status().items():
                print(f"{name:11} {answer}")
            return 0 if stack.is_up() else 1
        else:
            for name, value in stack.client_environment().items():
                print(f"export {name}={shlex.quote(value)}")
    except StackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; `status` says what runs, `down` ends it", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
