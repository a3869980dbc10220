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
    return f"{_source(config.model)} -> models:/{config.name}, alias {config.alias}"


def execute(config: RegisterConfig) -> dict[str, Any]:
    from adaconv import checkpoint
    from adaconv.tracking.registry import register, rollback
    from adaconv.tracking.runs import default_uri

    if config.model is None:
        tracking_uri = default_uri(config.tracking.uri, Path.cwd())
        version = rollback(
            name=config.name, alias=str(config.rollback), reason=config.reason, tracking_uri=tracking_uri
        )
        return {
            "model": version.uri,
            "version": version.version,
            "run_id": version.run_id,
            "tracking_uri": tracking_uri,
        }
    uri = _source(config.model)
    tracked_at = None
    if not uri.startswith("models:/"):
        tracked_at = checkpoint.meta_of(uri).get("tracking_uri")
    tracking_uri = default_uri(config.tracking.uri or tracked_at, Path.cwd())
    version = register(uri, name=config.name, alias=config.alias, reason=config.reason, tracking_uri=tracking_uri)
    return {
        "model": version.uri,
        "version": version.version,
        "run_id": version.run_id,
        "checkpoint": uri,
        "tracking_uri": tracking_uri,
    }


def _source(model: str) -> str:
    from adaconv.tracking.registry import find_checkpoint

    return model if model.startswith("models:/") else find_checkpoint(model)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(RegisterConfig, argv, prog="pipelines/register.py", doc=__doc__, plan=plan, execute=execute)


if __name__ == "__main__":
    sys.exit(main())
