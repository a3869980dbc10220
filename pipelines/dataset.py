"""What is done with a dataset version that is there.

    python pipelines/dataset.py append --dataset data/photos --source more/       new shards, a new version
    python pipelines/dataset.py remove --dataset data/paintings --artist NAME     by key, label, artist, source or list
    python pipelines/dataset.py diff --dataset data/photos --against data/photos@VERSION
    python pipelines/dataset.py versions --dataset data/photos                    lists them, and which is LATEST
    python pipelines/dataset.py rollback --dataset data/photos --to 3a9ab581035ede6e   LATEST names an earlier one again
    python pipelines/dataset.py verify --dataset data/photos                      every byte; locates what is damaged
    python pipelines/dataset.py similar --dataset data/photos --against data/evaluation   what both hold
    python pipelines/dataset.py report --dataset data/photos --output report/     one HTML page
    python pipelines/dataset.py gc --dataset data/photos --keep-last 2            deletes what no version needs

Each takes --help, --config and --dry-run as every pipeline does.
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconv import cli
from adaconv.cli import Command
from adaconv.config.dataset import (
    AppendConfig,
    DiffConfig,
    GcConfig,
    RemoveConfig,
    ReportConfig,
    RollbackConfig,
    SimilarConfig,
    VerifyConfig,
    VersionsConfig,
)

if TYPE_CHECKING:
    from adaconv.data.builds import Listing
    from adaconv.data.changes import Garbage
    from adaconv.data.manifest import DatasetVersion
    from adaconv.data.selection import Criterion

log = logging.getLogger(__name__)

_OTHERS_STAY = (
    "the other versions stay, and LATEST names one again by another rollback, or by the command that made it; "
    "pipelines/dataset.py gc --keep-last deletes those that LATEST does not descend from"
)


def append(config: AppendConfig) -> dict[str, Any]:
    from adaconv import storage
    from adaconv.data.builds import result_of, whole_version
    from adaconv.data.manifest import latest_version
    from adaconv.data.selection import without
    from adaconv.orchestration.cluster import connect

    after = latest_version(_root(config))
    config = config.model_copy(update={"source": tuple(map(storage.absolute, config.source))})
    with _to_append(config) as (parent, listing, exclusions):
        finished = whole_version(parent.root, listing, without(parent.recipe, exclusions), parent.version)
        if finished:
            log.info("nothing to do: these images are in version %s", finished.version)
            return {**result_of(finished), "made": 0}
        with connect():
            from adaconv.orchestration.dataset_job import run_append

            # The version that was looked at: LATEST may name another one by now, with a list of its own.
            config = config.model_copy(update={"dataset": f"{parent.root}@{parent.version}"})
            return run_append(config, listing, exclusions, after=after)


@contextmanager
def _to_append(config: AppendConfig) -> "Iterator[tuple[DatasetVersion, Listing, list[Criterion]]]":
    """The version, what is to be added to it and what of that is not; for as long as the block lasts."""
    from adaconv.data.builds import spill_listing
    from adaconv.data.layouts import iter_artworks
    from adaconv.data.manifest import open_version
    from adaconv.data.selection import read_exclusions
    from adaconv.errors import UsageError
    from adaconv.scratch import scratch_folder

    parent = open_version(config.dataset)
    exclusions = read_exclusions(config.exclude)
    if "exclude" in parent.recipe and config.exclude is None:
        raise UsageError(
            f"version {parent.version} was made with a list of what is to get into no shard: give it, or a later one, "
            "by --exclude; an empty file excludes nothing"
        )
    with scratch_folder("listing") as scratch:
        yield parent, spill_listing(iter_artworks(config.source, parent.recipe["layout"]), scratch), exclusions


def remove(config: RemoveConfig) -> dict[str, Any]:
    from adaconv.data.manifest import open_version
    from adaconv.orchestration.cluster import connect

    open_version(config.dataset)
    with connect():
        from adaconv.orchestration.dataset_job import run_remove

        return run_remove(config)


def diff(config: DiffConfig) -> dict[str, Any]:
    from adaconv.data.changes import diff
    from adaconv.data.manifest import open_version

    return diff(open_version(config.dataset), open_version(config.against))


def versions(config: VersionsConfig) -> dict[str, Any]:
    from adaconv.data.changes import describe_versions

    described = describe_versions(config.dataset)
    for told in described:
        log.info("%s", _line(told))
    return {"versions": described}


def rollback(config: RollbackConfig) -> dict[str, Any]:
    from adaconv.data.builds import result_of
    from adaconv.data.changes import roll_back
    from adaconv.data.manifest import open_version

    before = roll_back(config.dataset, config.to)
    return {**result_of(open_version(config.dataset)), "before": before, "note": _OTHERS_STAY}


def verify(config: VerifyConfig) -> dict[str, Any]:
    from adaconv.data.manifest import open_version
    from adaconv.orchestration.cluster import connect

    open_version(config.dataset)
    with connect():
        from adaconv.orchestration.dataset_job import run_verify

        return run_verify(config)


def similar(config: SimilarConfig) -> dict[str, Any]:
    from adaconv.data.ingest import check_hashes
    from adaconv.data.manifest import open_version
    from adaconv.data.similar import similar_pairs

    shown = 100
    columns = ["key", "source", "phash"]
    versions = [open_version(spec) for spec in (config.dataset, config.against) if spec]
    for version in versions if config.against else ():
        check_hashes(version.recipe, of=f"{version.root}@{version.version}")
    tables = [version.samples(columns) for version in versions]
    first, second = tables[0], tables[-1]
    others = second["phash"].to_numpy() if config.against else None
    pairs = similar_pairs(first["phash"].to_numpy(), distance=config.distance, others=others)
    listed = [
        {
            "distance": pair.distance,
            "same_bytes": first["key"][pair.first].as_py() == second["key"][pair.second].as_py(),
            "first": first["source"][pair.first].as_py(),
            "second": second["source"][pair.second].as_py(),
        }
        for pair in pairs[:shown]
    ]
    result = {"images": len(first), "pairs": len(pairs), "listed": listed}
    if config.against and pairs:
        said = f"{len(pairs)} pairs of images lie in both, the first: {listed[0]['first']} and {listed[0]['second']}"
        return {**result, "status": "failed", "error": f"{said}; take them out of one with pipelines/dataset.py remove"}
    return result


def report(config: ReportConfig) -> dict[str, Any]:
    from adaconv import storage
    from adaconv.data.builds import result_of
    from adaconv.data.manifest import open_version
    from adaconv.data.report import render

    version = open_version(config.dataset)
    page = storage.join(storage.absolute(config.output), "report.html")
    storage.publish_bytes(page, render(version, distance=config.distance, sheet=config.sheet).encode())
    return {**result_of(version), "report": page}


def gc(config: GcConfig) -> dict[str, Any]:
    from adaconv.data.changes import collect

    garbage = _garbage(config)
    collect(garbage)
    return {
        "versions_deleted": list(garbage.versions),
        "files_deleted": len(garbage.files),
        "bytes": garbage.bytes,
        "uploads_aborted": len(garbage.uploads),
    }


def plan_gc(config: GcConfig) -> str:
    garbage = _garbage(config)
    what = f"versions {', '.join(garbage.versions) or 'none'}; {len(garbage.files)} files, {garbage.bytes / 1e6:.1f} MB"
    uploads = [f"{entry.path} (an upload that never ended)" for entry in garbage.uploads]
    return "\n".join([f"to delete: {what}", *(entry.path for entry in garbage.files), *uploads])


def _garbage(config: GcConfig) -> "Garbage":
    """What no version needs, if no training that is known reads what is to go."""
    from adaconv.data.changes import find_garbage
    from adaconv.data.manifest import open_version
    from adaconv.errors import UsageError
    from adaconv.tracking.runs import default_uri
    from adaconv.tracking.trace import running_on

    garbage = find_garbage(config.dataset, keep_last=config.keep_last, older_than_hours=config.older_than_hours)
    tracked = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if garbage.versions and tracked:
        hashes = {open_version(f"{garbage.root}@{name}").root_hash for name in garbage.versions}
        if runs := running_on(hashes, tracking_uri=default_uri(tracked, Path.cwd())):
            raise UsageError(
                f"versions {', '.join(garbage.versions)} were to be deleted, but trainings that go on read some of "
                f"them: {', '.join(runs)}. Wait for their end (pipelines/runs.py reap ends what is dead), or keep more"
            )
    return garbage


def plan_remove(config: RemoveConfig) -> str:
    from adaconv.data.changes import by_shard
    from adaconv.data.manifest import open_version
    from adaconv.data.selection import criteria_of, keys_to_remove, read_exclusions

    version = open_version(config.dataset)
    keys = keys_to_remove(version.rows(), criteria_of(config), read_exclusions(config.exclude))
    touched = {name for name, rows in by_shard(version.rows()) if any(row["key"] in keys for row in rows)}
    size = sum(shard.bytes for shard in version.shards if shard.name in touched)
    shards = f"{len(touched)} of {len(version.shards)} shards, {size / 1e6:.1f} MB"
    return f"{len(keys)} images to remove; {shards}, to write again without them"


def plan_version(config: Any) -> str:
    from adaconv.data.manifest import open_version

    version = open_version(config.dataset)
    return f"version {version.version} of {version.root}: {version.books['found']} images, {len(version.shards)} shards"


def plan_append(config: AppendConfig) -> str:
    with _to_append(config) as (_, listing, _):
        added = f"{listing.images} images, {listing.bytes / 1e6:.1f} MB from {', '.join(config.source)}"
    return f"{plan_version(config)}; to it {added}"


def plan_against(config: DiffConfig | SimilarConfig) -> str:
    from adaconv.data.manifest import open_version

    if config.against is None:
        return plan_version(config)
    other = open_version(config.against)
    return f"{plan_version(config)}; against version {other.version} of {other.root}"


def plan_versions(config: VersionsConfig) -> str:
    from adaconv.data.changes import describe_versions

    return "\n".join(map(_line, describe_versions(config.dataset)))


def _line(told: dict[str, Any]) -> str:
    """A version, as `describe_versions` tells of it."""
    what = told.get("error") or (
        f"parent {told['parent'] or 'none'} | {told['images']} images | {told['shards']} shards | "
        f"{told['bytes'] / 1e6:.1f} MB"
    )
    return f"{told['version']} | {told['written']} | {what}{' | LATEST' if told['latest'] else ''}"


def plan_rollback(config: RollbackConfig) -> str:
    from adaconv.data.changes import require_whole
    from adaconv.data.manifest import latest_version

    version = require_whole(config.dataset, config.to)
    return f"LATEST of {version.root}: from {latest_version(version.root) or 'none'} to {config.to}; {_OTHERS_STAY}"


def _root(config: Any) -> str:
    """Of the dataset that a command changes: there its result.json lies."""
    from adaconv.data.manifest import split_spec

    return split_spec(config.dataset)[0]


COMMANDS = {
    "append": Command(AppendConfig, append, plan_append, _root),
    "remove": Command(RemoveConfig, remove, plan_remove, _root),
    "diff": Command(DiffConfig, diff, plan_against),
    "versions": Command(VersionsConfig, versions, plan_versions),
    "rollback": Command(RollbackConfig, rollback, plan_rollback, _root),
    "verify": Command(VerifyConfig, verify, plan_version),
    "similar": Command(SimilarConfig, similar, plan_against),
    "report": Command(ReportConfig, report, plan_version),
    "gc": Command(GcConfig, gc, plan_gc),
}


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run_command(COMMANDS, argv, prog="pipelines/dataset.py", doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
