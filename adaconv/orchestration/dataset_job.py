"""What is done to a dataset version that is there: add to it, take away from it, read every byte of it."""

import hashlib
import heapq
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import accumulate
from typing import Any

import ray

from adaconv import storage
from adaconv.config.dataset import AppendConfig, RemoveConfig, VerifyConfig
from adaconv.config.shard import ShardConfig
from adaconv.data.builds import Listing, result_of
from adaconv.data.changes import by_shard, excluded
from adaconv.data.ingest import check_codecs, settings_of
from adaconv.data.manifest import (
    IN_SHARDS,
    DatasetVersion,
    Row,
    Shard,
    how_to_mend,
    latest_version,
    manifest_uri,
    open_version,
    publish_version,
    require_shards,
    rows_of_shard,
    split_spec,
)
from adaconv.data.selection import Criterion, criteria_of, keys_to_remove, read_exclusions, without
from adaconv.data.shard_writer import rewrite_shard
from adaconv.data.verify import Damage, verify_manifest, verify_shard
from adaconv.errors import DatasetError, UsageError
from adaconv.orchestration.board import Teller
from adaconv.orchestration.shard_job import noted_shards, notes_of, publish_note, run_shard_job
from adaconv.orchestration.tasks import run_tasks

log = logging.getLogger(__name__)

_SHOWN = 100  # damages that result.json lists


def run_append(
    config: AppendConfig, listing: Listing, exclusions: Sequence[Criterion], *, after: str | None
) -> dict[str, Any]:
    """Add images, but for those that are to get into no shard: new shards, and a version whose parent is the one that
    was given. Nothing new makes no version.

    Args:
        config: of the job; its dataset names the version.
        listing: of the images.
        exclusions: what is to get into no shard.
        after: what LATEST said before the version was opened: whoever publishes meanwhile is seen.

    Raises:
        DatasetError: shards of the dataset are not there, or it was made with other codecs than those here.
        QuarantineBudgetError: too many of the new images were refused.
    """
    parent = open_version(config.dataset)
    require_shards(parent)
    check_codecs(parent.recipe)
    settings = ShardConfig(
        source=config.source,
        output=parent.root,
        shard=settings_of(parent.recipe),
        budget=config.budget,
        scaling=config.scaling,
    )
    before = sum(shard.bytes for shard in parent.shards)
    result = run_shard_job(
        settings, listing, without(parent.recipe, exclusions), exclusions=exclusions, parent=parent, after=after
    )
    return {**result, "bytes_written": result["bytes"] - before}


def run_remove(config: RemoveConfig) -> dict[str, Any]:
    """Take images out: shards that hold none of them stay, the others are written again without them.

    Raises:
        UsageError: a criterion names no image.
        DatasetError: a shard is damaged, or not there; or another job published meanwhile.
    """
    after = latest_version(split_spec(config.dataset)[0])
    parent = open_version(config.dataset)
    require_shards(parent)
    try:
        return _remove(config, parent, after)
    except FileNotFoundError as error:
        if (latest := latest_version(parent.root)) == after:
            raise
        raise DatasetError(
            f"another job published version {latest} of {parent.root} while this one ran, and removed what was noted. "
            "The same command goes on from there"
        ) from error


def _remove(config: RemoveConfig, parent: DatasetVersion, after: str | None) -> dict[str, Any]:
    exclusions = read_exclusions(config.exclude)
    reasons = keys_to_remove(parent.rows(), criteria_of(config), exclusions)
    if not reasons:
        log.info("nothing to do: they are not in version %s", parent.version)
        return {**result_of(parent), "removed": 0, "shards_rewritten": 0, "bytes_written": 0}
    digest = hashlib.sha256(json.dumps([parent.version, sorted(reasons), config.why]).encode()).hexdigest()[:16]
    work = storage.join(parent.root, "work", digest)
    sizes = {shard.name: shard for shard in parent.shards}
    touched = dict[str, int]()

    def coming() -> Iterator[tuple[str, list[Row]]]:
        for name, rows in by_shard(parent.rows()):
            left = [row for row in rows if row["key"] not in reasons]
            if len(left) < len(rows):
                touched[name] = len(left)
                if left:
                    yield name, left

    def publish(plan: tuple[str, list[Row]]) -> dict[str, Any]:
        name, left = plan
        storage.publish_bytes(storage.join(work, "plan", f"{name}.json"), json.dumps(left).encode())
        return {"name": name}

    jobs = list(storage.few_at_once(publish, coming(), where=work))
    if touched.keys() == sizes.keys() and not jobs:
        raise UsageError(
            f"expected images to be left of version {parent.version}, found that all {len(reasons)} would go; delete "
            f"{parent.root} instead"
        )
    answers = run_tasks(
        rewrite_and_note,
        jobs,
        what="rewrite",
        images=sum(touched.values()),
        num_workers=config.scaling.num_workers,
        root=parent.root,
        work=work,
    )
    for _ in answers:
        pass
    written = dict(noted_shards(work, (name for name in sizes if touched.get(name))))
    shards = [made for name, shard in sizes.items() if (made := written.get(name) if name in touched else shard)]

    def rows_in_order() -> Iterator[Row]:
        rewritten = notes_of(work, (name for name in sizes if touched.get(name)))
        for name, rows in by_shard(parent.rows()):
            if name not in touched:
                yield from rows
            elif touched[name]:
                written_as, _, rows = next(rewritten)
                assert written_as == name
                yield from rows
        # In no shard: what was taken out, and what never was in one, which lies in this order already.
        gone = (row for row in parent.rows() if _goes(row, reasons))
        taken_out = sorted((excluded(row, reasons[row["key"]], config.why) for row in gone), key=_by_source)
        outside = (row for row in parent.rows() if row["state"] not in IN_SHARDS and not _goes(row, reasons))
        yield from heapq.merge(taken_out, outside, key=_by_source)

    version = publish_version(
        parent.root,
        recipe=without(parent.recipe, exclusions) if exclusions else parent.recipe,
        shards=shards,
        rows=rows_in_order(),
        found=parent.books["found"],
        after=after,
        parent=parent,
    )
    storage.remove_directory(work)
    kept = {shard.name for shard in parent.shards}
    return {
        **result_of(version),
        "removed": version.books["excluded"] - parent.books["excluded"],
        "shards_rewritten": len(touched),
        "bytes_written": sum(shard.bytes for shard in version.shards if shard.name not in kept),
        "note": "the old version still holds them; pipelines/dataset.py gc --keep-last 1 deletes it",
    }


def _goes(row: Row, reasons: dict[str, str]) -> bool:
    return row["key"] in reasons and row["state"] in (*IN_SHARDS, "duplicate")


def _by_source(row: Row) -> tuple[str, str]:
    return row["source"], row["source_sha256"]


def rewrite_and_note(job: dict[str, Any], *, board: ray.actor.ActorHandle, root: str, work: str) -> dict[str, Any]:
    """A task: the samples of a shard that stay, to a shard of their own."""
    name = job["name"]
    rows: list[Row] = json.loads(storage.read_bytes(storage.join(work, "plan", f"{name}.json")))
    shard = rewrite_shard(root, rows)
    publish_note(work, name, shard, rows)
    told = Teller(board, name)
    told(len(rows), shard.bytes, 0)
    told.close()
    return {"name": name}


def run_verify(config: VerifyConfig) -> dict[str, Any]:
    """Read every byte of a version; `status` is `failed` where one is not what it was, with where it is.

    Raises:
        DatasetError: the version's own file is damaged, so that nothing else can be judged.
    """
    root, _ = split_spec(config.dataset)
    version = open_version(config.dataset)
    damages = verify_manifest(version)
    firsts = accumulate((shard.rows for shard in version.shards), initial=0)
    answers = run_tasks(
        verify_task,
        [
            {"name": shard.name, "shard": json.dumps(asdict(shard)), "first": first}
            for shard, first in zip(version.shards, firsts, strict=False)
        ],
        what="verify",
        images=sum(shard.rows for shard in version.shards),
        num_workers=config.scaling.num_workers,
        root=root,
        manifest="" if damages else manifest_uri(root, version.version),
    )
    for answer in answers:
        damages += [Damage(**values) for values in json.loads(answer["damages"])]
    damages.sort(key=lambda damage: (damage.file, damage.start))
    for damage in damages[:_SHOWN]:
        log.error("%s", damage)
    result = {
        "root": root,
        "version": version.version,
        "shards": len(version.shards),
        "bytes": sum(shard.bytes for shard in version.shards),
        "damaged": len(damages),
        "damages": [asdict(damage) for damage in damages[:_SHOWN]],
    }
    if damages:
        files = sorted({damage.file for damage in damages})
        error = (
            f"{len(damages)} places of {len(files)} files are damaged, the first: {damages[0]}. Delete the damaged "
            f"files and {how_to_mend(version)}"
        )
        return {**result, "status": "failed", "error": error}
    return result


def verify_task(job: dict[str, Any], *, board: ray.actor.ActorHandle, root: str, manifest: str) -> dict[str, Any]:
    """A task: a shard against its hash; where that differs, its samples against the manifest."""
    shard = Shard(**json.loads(job["shard"]))

    def rows() -> list[Row] | None:
        if not manifest:
            return None
        return rows_of_shard(manifest, shard, first=job["first"])

    damages = verify_shard(root, shard, rows)
    told = Teller(board, shard.name)
    told(shard.rows, shard.bytes, len(damages))
    told.close()
    return {"name": shard.name, "damages": json.dumps([asdict(damage) for damage in damages])}
