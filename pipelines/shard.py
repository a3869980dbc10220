"""Raw images to a dataset version: WebDataset shards, a manifest with a row for every image, closed books.

    python pipelines/shard.py --config conf/shard/base.yaml --source photos/ --output data/photos

The same images and recipe give the same bytes. The same command again goes on where it was broken off.
"""

import sys
from collections.abc import Sequence
from typing import Any

from adaconv import cli
from adaconv.config.shard import ShardConfig


def plan(config: ShardConfig) -> str:
    from adaconv.data.sources import list_images

    found = list_images(config.source)
    sources = ", ".join(config.source)
    return f"{len(found)} images from {sources} to shards of {config.shard.target_mb:g} MB in {config.output}"


def execute(config: ShardConfig) -> dict[str, Any]:
    from adaconv import storage
    from adaconv.data.sources import list_images
    from adaconv.orchestration.cluster import connect

    list_images(config.source)  # a typo is answered before a cluster is started
    if storage.is_local(config.output):
        cli.require_writable(config.output, "--output")
    config = config.model_copy(update={"output": storage.absolute(config.output)})
    with connect():
        from adaconv.orchestration.shard_job import run_shard_job

        return run_shard_job(config)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(ShardConfig, argv, prog="pipelines/shard.py", doc=__doc__, plan=plan, execute=execute)


if __name__ == "__main__":
    sys.exit(main())
