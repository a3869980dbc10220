"""Raw images to a dataset version: WebDataset shards, a manifest with a row for every image, closed books.

    python pipelines/shard.py --config conf/shard/base.yaml --source photos/ --output data/photos

The same images and recipe give the same bytes. The same command again goes on where it was broken off.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from adaconv import cli
from adaconv.config.shard import ShardConfig

if TYPE_CHECKING:
    from adaconv.data.builds import Listing
    from adaconv.data.selection import Criterion

log = logging.getLogger(__name__)


class Listed(NamedTuple):
    """What the listing came to: images, the recipe of their version, and what is to get into none of its shards."""

    listing: "Listing"
    recipe: dict[str, Any]
    exclusions: "list[Criterion]"


def plan(config: ShardConfig) -> str:
    from adaconv.data.forecast import forecast, serves, shortage

    with _listed(config) as listed:
        told, coming = _told(config, listed), forecast(listed.listing, config.shard)
    if not coming.shards:
        return f"{told}: the {coming.looked_at} images that were looked at would all be refused"
    short = shortage(coming.shards, coming.bytes, nodes=config.for_nodes)
    lines = [
        f"{told} to about {coming.shards} shards of {config.shard.target_mb:g} MB, {coming.bytes / 1e6:.1f} MB in all "
        f"(by the headers of {coming.looked_at} images), in {config.output}",
        serves(coming.shards),
        *([f"warning: {short}"] if short else []),
    ]
    return "\n".join(lines)


def execute(config: ShardConfig) -> dict[str, Any]:
    from adaconv import storage
    from adaconv.data.builds import result_of, whole_version
    from adaconv.data.manifest import split_spec
    from adaconv.errors import UsageError
    from adaconv.orchestration.cluster import connect

    if split_spec(config.output)[1]:
        raise UsageError(
            f"--output {config.output}: what stands behind an @ would be read as a version; name it otherwise"
        )
    cli.require_writable(config.output)
    absolute = {"output": storage.absolute(config.output), "source": tuple(map(storage.absolute, config.source))}
    config = config.model_copy(update=absolute)
    with _listed(config) as listed:
        log.info("%s", _told(config, listed))
        finished = whole_version(config.output, listed.listing, listed.recipe)
        if finished:
            log.info("nothing to do: this build is version %s", finished.version)
            return _served(config, {**result_of(finished), "made": 0})
        with connect():
            from adaconv.orchestration.shard_job import run_shard_job

            result = run_shard_job(config, listed.listing, listed.recipe, exclusions=listed.exclusions)
            return _served(config, result)


def _served(config: ShardConfig, result: dict[str, Any]) -> dict[str, Any]:
    from adaconv.data.forecast import serves, shortage

    short = shortage(result["shards"], result["bytes"], nodes=config.for_nodes)
    log.info("%s", serves(result["shards"]))
    return {**result, "warning": short} if short else result


@contextmanager
def _listed(config: ShardConfig) -> Iterator[Listed]:
    """For as long as the block lasts."""
    from adaconv.data.builds import spill_listing
    from adaconv.data.ingest import recipe_of
    from adaconv.data.layouts import iter_artworks
    from adaconv.data.selection import read_exclusions, without
    from adaconv.data.subset import Subset
    from adaconv.scratch import scratch_folder

    exclusions = read_exclusions(config.exclude)
    with scratch_folder("listing") as scratch:
        subset = Subset(config.subset, scratch)
        listing = spill_listing(subset.of(iter_artworks(config.source, config.shard.layout)), scratch)
        yield Listed(listing, without({**recipe_of(config.shard), **subset.recipe()}, exclusions), exclusions)


def _told(config: ShardConfig, listed: Listed) -> str:
    of = f" of {listed.recipe['subset']['of']}" if "subset" in listed.recipe else ""
    told = f"{listed.listing.images}{of} images, {listed.listing.bytes / 1e6:.1f} MB from {', '.join(config.source)}"
    if config.exclude is not None:
        told += f" (but for what the {len(listed.exclusions)} lines of {config.exclude} name)"
    return told


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(ShardConfig, argv, prog="pipelines/shard.py", doc=__doc__, plan=plan, execute=execute)


if __name__ == "__main__":
    sys.exit(main())
