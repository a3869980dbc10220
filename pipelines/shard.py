"""Raw images to a dataset version: WebDataset shards, a manifest with a row for every image, closed books.

    python pipelines/shard.py --config conf/shard/base.yaml --source photos/ --output data/photos

The same images and recipe give the same bytes. The same command again goes on where it was broken off.
"""

import logging
import sys
from collections.abc import Sequence
from typing import Any

from adaconv import cli
from adaconv.config.shard import ShardConfig

log = logging.getLogger(__name__)


def plan(config: ShardConfig) -> str:
    from adaconv.data.sources import iter_images

    images, megabytes = 0, 0.0
    for found in iter_images(config.source):
        images, megabytes = images + 1, megabytes + found.bytes / 1e6
    sources = ", ".join(config.source)
    return (
        f"{images} images, {megabytes:.0f} MB from {sources} to shards of {config.shard.target_mb:g} MB, "
        f"{megabytes / config.shard.target_mb + 1:.0f} at most, in {config.output}"
    )


def execute(config: ShardConfig) -> dict[str, Any]:
    from adaconv import storage
    from adaconv.data.builds import result_of, spill_listing, whole_version
    from adaconv.data.ingest import recipe_of
    from adaconv.data.manifest import split_spec
    from adaconv.data.sources import iter_images
    from adaconv.errors import UsageError
    from adaconv.orchestration.cluster import connect
    from adaconv.scratch import scratch_folder

    if split_spec(config.output)[1]:
        raise UsageError(
            f"--output {config.output}: what stands behind an @ would be read as a version; name it otherwise"
        )
    if storage.is_local(config.output):
        cli.require_writable(config.output, "--output")
    absolute = {"output": storage.absolute(config.output), "source": tuple(map(storage.absolute, config.source))}
    config = config.model_copy(update=absolute)
    with scratch_folder("listing") as scratch:
        listing = spill_listing(iter_images(config.source), scratch)
        log.info("%d images, %.1f MB in %s", listing.images, listing.bytes / 1e6, ", ".join(config.source))
        finished = whole_version(config.output, listing, recipe_of(config.shard))
        if finished:
            log.info("nothing to do: this build is version %s", finished.version)
            return {**result_of(finished), "made": 0}
        with connect():
            from adaconv.orchestration.shard_job import run_shard_job

            return run_shard_job(config, listing)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(ShardConfig, argv, prog="pipelines/shard.py", doc=__doc__, plan=plan, execute=execute)


if __name__ == "__main__":
    sys.exit(main())
