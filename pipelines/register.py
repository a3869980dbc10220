"""Give a checkpoint a name: a version of a registered model, with an alias that jobs can rely on.

    python pipelines/register.py --model runs/ --name adaconv --alias candidate
    python pipelines/register.py --model models:/adaconv@candidate --alias champion --reason "sharper"
    python pipelines/register.py --rollback champion --reason "halos around faces"

Every move of an alias is kept, with who, when and why.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaconv import cli
from adaconv.config.register import RegisterConfig


def plan(config: RegisterConfig) -> str:
    if config.model is None:
        return f"models:/{config.name}@{config.rollback} -> the version that it was before"
    from adaconv.tracking.registry import source_of

    return f"{source_of(config.model)[0]} -> models:/{config.name}, alias {config.alias}"


def execute(config: RegisterConfig) -> dict[str, Any]:
    from adaconv.tracking.registry import register, rollback, source_of
    from adaconv.tracking.runs import default_uri

    uri, tracked_at = (None, None) if config.model is None else source_of(config.model)
    tracking_uri = default_uri(config.tracking.uri, Path.cwd(), found=tracked_at)
    how = {"name": config.name, "reason": config.reason, "tracking_uri": tracking_uri}
    if uri is None:
        version = rollback(alias=str(config.rollback), **how)
    else:
        version = register(uri, alias=config.alias, **how)
    return {
        "model": version.uri,
        "version": version.version,
        "run_id": version.run_id,
        **({"checkpoint": uri} if uri else {}),
        "tracking_uri": tracking_uri,
    }


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(RegisterConfig, argv, prog="pipelines/register.py", doc=__doc__, plan=plan, execute=execute)


if __name__ == "__main__":
    sys.exit(main())
