"""Give a checkpoint a name: a new version of a registered model, with an alias that jobs can rely on.

python pipelines/register.py --model runs/ --name adaconv --alias champion
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaconv import cli
from adaconv.config.register import RegisterConfig


def plan(config: RegisterConfig) -> str:
    from adaconv.tracking.registry import find_checkpoint

    return f"{find_checkpoint(config.model)} -> models:/{config.name}, alias {config.alias}"


def execute(config: RegisterConfig) -> dict[str, Any]:
    from adaconv import checkpoint
    from adaconv.tracking.mlflow_tracker import default_uri
    from adaconv.tracking.registry import find_checkpoint, register

    uri = find_checkpoint(config.model)
    tracked_at = checkpoint.load_meta(checkpoint.fetch(uri)).get("tracking_uri")
    tracking_uri = default_uri(config.tracking.uri or tracked_at, Path.cwd())
    version = register(uri, name=config.name, alias=config.alias, reason=config.reason, tracking_uri=tracking_uri)
    return {
        "model": version.uri,
        "version": version.version,
        "run_id": version.run_id,
        "checkpoint": uri,
        "tracking_uri": tracking_uri,
    }


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(RegisterConfig, argv, prog="pipelines/register.py", doc=__doc__, plan=plan, execute=execute)


if __name__ == "__main__":
    sys.exit(main())
