"""Raw images to a dataset version on Ray Data: look at every header, plan, write shards, close the books.

No image passes through the driver: scanning returns a row an image, writing returns where a shard's rows were noted.
A shard is the unit of commit. Its rows are noted in ROOT/work/<plan>/<index>.json when its tar is published, so a job
that was broken off goes on with the shards that are missing.
"""

import hashlib
import json
import logging
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray

from adaconv import storage
from adaconv.config.shard import BudgetConfig, RecipeConfig, ShardConfig
from adaconv.data.ingest import key_of, refuse_by_header
from adaconv.data.manifest import MANIFEST, DatasetVersion, Shard, publish_version
from adaconv.data.plan import Candidate, ShardPlan, plan_shards
from adaconv.data.shard_writer import row_of, write_shard
from adaconv.data.sources import Found, list_images
from adaconv.errors import QuarantineBudgetError
from adaconv.images import ImageError
from adaconv.orchestration.cluster import quiet_ray_data
from adaconv.progress import Progress

log = logging.getLogger(__name__)

_SCAN_AT_ONCE = 64
_WORKER_DEATHS_ADMITTED = 2  # of one task; Ray's own default is without end


def run_shard_job(config: ShardConfig) -> dict[str, Any]:
    """Build the version of these images and this recipe below `config.output`; does nothing that is done already.

    Raises:
        UsageError: no images.
        QuarantineBudgetError: too many images were refused; nothing was published.
    """
    found = list_images(config.source)
    log.info("%d images in %s", len(found), ", ".join(config.source))
    candidates, refused = _scan(found, config.shard)
    plans, duplicates = plan_shards(candidates, config.shard)
    rows = [*refused, *(row_of(left, "duplicate", f"of_{stays.source}") for left, stays in duplicates)]
    work = storage.join(config.output, "work", _digest(plans, config.shard))
    done = dict(_noted(work, plans))
    for shard, rows_of_shard in _write(plans, done, config, work):
        done[shard] = rows_of_shard
    shards = []
    for index in range(len(plans)):
        noted = done[index]
        rows += noted["rows"]
        if noted["shard"]:
            shards.append(Shard(**noted["shard"]))
    _refuse_over_budget(rows, config.budget)
    version = publish_version(
        config.output,
        recipe=recipe_of(config.shard),
        shards=shards,
        rows=pa.Table.from_pylist(rows, schema=MANIFEST),
    )
    storage.remove_directory(work, first="0.json")
    return _result(version)


def recipe_of(config: RecipeConfig) -> dict[str, Any]:
    """All that determines the bytes of a shard besides the images: settings, and the versions of the codecs."""
    import PIL
    from PIL import features

    codecs = {name: features.version(name) for name in ("jpg", "libjpeg_turbo", "webp", "zlib")}
    return {**config.model_dump(mode="json"), "pillow": PIL.__version__, "codecs": codecs}


def _scan(found: list[Found], recipe: RecipeConfig) -> tuple[list[Candidate], list[dict[str, Any]]]:
    """Read every file once: its key and size, or why it is refused."""
    chunks = [found[first : first + _SCAN_AT_ONCE] for first in range(0, len(found), _SCAN_AT_ONCE)]
    candidates, refused = [], []
    progress = Progress("scan", total=len(found))
    for answers in _on_ray(_scan_chunk, [{"found": [asdict(f) for f in chunk]} for chunk in chunks], recipe):
        for answer in answers["rows"]:
            if answer["state"] == "":
                candidates.append(Candidate(**answer["candidate"]))
            else:
                refused.append(row_of(Candidate(**answer["candidate"]), answer["state"], answer["reason"]))
        progress.advance(len(answers["rows"]), refused=len(refused))
    progress.close()
    return candidates, refused


def _scan_chunk(job: dict[str, Any], recipe: RecipeConfig) -> dict[str, Any]:
    rows = []
    for values in job["found"]:
        image = Found(**values)
        data = storage.read_bytes(image.uri)
        width = height = 0
        state = reason = ""
        try:
            width, height = refuse_by_header(data, recipe).size
        except ImageError as error:
            state, reason = "quarantined", error.reason
        candidate = Candidate(
            key=key_of(data),
            uri=image.uri,
            source=image.source,
            label=image.label,
            sha256=hashlib.sha256(data).hexdigest(),
            bytes=len(data),
            width=width,
            height=height,
        )
        rows.append({"candidate": asdict(candidate), "state": state, "reason": reason})
    return {"rows": rows}


def _write(
    plans: list[ShardPlan], done: dict[int, Any], config: ShardConfig, work: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    todo = [plan for plan in plans if plan.index not in done]
    if done:
        log.info("%d of %d shards are there already", len(done), len(plans))
    progress = Progress(
        "shard",
        total=sum(len(plan.candidates) for plan in plans),
        done=sum(len(plan.candidates) for plan in plans if plan.index in done),
    )
    quarantined = 0
    jobs = [{"plan": json.dumps(asdict(plan)), "root": config.output, "work": work} for plan in todo]
    for answer in _on_ray(_write_and_note, jobs, config.shard):
        noted = _read_note(work, answer["index"])
        quarantined += sum(row["state"] == "quarantined" for row in noted["rows"])
        progress.advance(len(noted["rows"]), quarantined=quarantined)
        yield answer["index"], noted
    progress.close()


def _write_and_note(job: dict[str, Any], recipe: RecipeConfig) -> dict[str, Any]:
    values = json.loads(job["plan"])
    plan = ShardPlan(values["index"], tuple(Candidate(**candidate) for candidate in values["candidates"]))
    shard, rows = write_shard(plan, recipe, job["root"])
    note = {"shard": asdict(shard) if shard else None, "rows": rows}
    storage.publish_bytes(_note_uri(job["work"], plan.index), json.dumps(note).encode())
    return {"index": plan.index}


def _on_ray(function: Any, jobs: list[dict[str, Any]], recipe: RecipeConfig) -> Iterable[dict[str, Any]]:
    """One Ray Data task a job; answers come as they are ready."""
    if not jobs:
        return iter(())
    quiet_ray_data()
    dataset = ray.data.from_items(jobs, override_num_blocks=len(jobs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there is no other way yet to bound the retries
        mapped = dataset.map(function, fn_args=(recipe,), num_cpus=1, max_retries=_WORKER_DEATHS_ADMITTED)
    answers: Iterable[dict[str, Any]] = mapped.iter_rows()
    return answers


def _noted(work: str, plans: list[ShardPlan]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Shards of this very plan that an earlier start has published."""
    there = {storage.name_of(uri) for uri in storage.list_files(work)}
    for plan in plans:
        if f"{plan.index}.json" in there:
            yield plan.index, _read_note(work, plan.index)


def _note_uri(work: str, index: int) -> str:
    return storage.join(work, f"{index}.json")


def _read_note(work: str, index: int) -> dict[str, Any]:
    note: dict[str, Any] = json.loads(storage.read_bytes(_note_uri(work, index)))
    return note


def _digest(plans: list[ShardPlan], recipe: RecipeConfig) -> str:
    planned = [[(c.sha256, c.source) for c in plan.candidates] for plan in plans]
    return hashlib.sha256(json.dumps([planned, recipe_of(recipe)], sort_keys=True).encode()).hexdigest()[:16]


def _refuse_over_budget(rows: list[dict[str, Any]], budget: BudgetConfig) -> None:
    bad = [row for row in rows if row["state"] == "quarantined"]
    allowed = max(budget.at_least, int(budget.share * len(rows)))
    if len(bad) > allowed:
        examples = ", ".join(f"{row['source']} ({row['reason']})" for row in bad[:5])
        raise QuarantineBudgetError(
            f"{len(bad)} of {len(rows)} images were refused, {allowed} are allowed; the first: {examples}. Nothing was "
            "published. Mend the images, or raise --budget.share or --budget.at-least"
        )


def _result(version: DatasetVersion) -> dict[str, Any]:
    return {
        "root": version.root,
        "version": version.version,
        "root_hash": version.root_hash,
        "shards": len(version.shards),
        "bytes": sum(shard.bytes for shard in version.shards),
        "books": dict(version.books),
    }
