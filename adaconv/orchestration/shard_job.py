"""Raw images to a dataset version on Ray Data: list, look at every header, plan, write shards, close the books.

Nothing large passes through the driver: it lists, and sorts what was found on disk; tasks read the images and leave
what they found in ROOT/work/<build>/, each under a name that follows from its input:

    listing/<chunk>.jsonl     files to look at                scan/<chunk>.jsonl       what their headers told
    plan/<plan>.json          images of a shard               shard/<plan>.parquet     the shard, and its rows
    started/<chunk or plan>   a task that was begun: one that finds this was killed, and decodes in a child process

A shard is the unit of commit. A job that was broken off goes on with what is missing. ROOT/builds/<build>.json says
which version a listing and recipe gave, so that a finished build is recognised from the listing alone.
"""

import hashlib
import json
import logging
import resource
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from adaconv import allocator, storage
from adaconv.config.shard import RecipeConfig, ShardConfig
from adaconv.data.builds import Listing, built_version, finished_version, note_build, result_of
from adaconv.data.changes import by_shard
from adaconv.data.ingest import (
    MENDABLE,
    Header,
    Refusal,
    check_codecs,
    ingest,
    look,
    refusal_of,
    settings_of,
)
from adaconv.data.isolation import IsolatedDecoder
from adaconv.data.manifest import (
    IN_SHARDS,
    DatasetVersion,
    Row,
    Shard,
    latest_version,
    publish_version,
    rows_of,
    table_of,
)
from adaconv.data.plan import Candidate, Catalog, ShardPlan, plan_shards, row_of
from adaconv.data.selection import Criterion, Selector
from adaconv.data.shard_writer import Ingest, read_ahead, refused_row, write_shard
from adaconv.data.sources import Found
from adaconv.errors import QuarantineBudgetError
from adaconv.orchestration.board import Teller
from adaconv.orchestration.tasks import run_tasks
from adaconv.scratch import scratch_folder

log = logging.getLogger(__name__)

_TOLD = 5  # criteria that the log counts


def run_shard_job(
    config: ShardConfig,
    listing: Listing,
    recipe: dict[str, Any],
    *,
    exclusions: Sequence[Criterion] = (),
    parent: DatasetVersion | None = None,
    after: str | None = None,
) -> dict[str, Any]:
    """Build the version of these images and this recipe below `config.output`, from where an earlier start stopped.

    Args:
        config: of the job.
        listing: of the images of `config.source`.
        recipe: of the version.
        exclusions: what is to get into no shard; the recipe tells of them.
        parent: a version that the images are to be added to; its shards stay as they are.
        after: what LATEST said before the parent was opened.

    Raises:
        QuarantineBudgetError: too many images were refused, or all; nothing was published.
        ConnectionError: the storage went away; the same command goes on.
    """
    if parent is None:
        after = latest_version(config.output)
    identity = listing.build(recipe, parent.version if parent else None)
    work = storage.join(config.output, "work", identity)
    try:
        with scratch_folder("catalog") as scratch, closing(Catalog(scratch / "catalog.sqlite")) as catalog:
            return _run(_Build(identity, config, listing, recipe, Selector(exclusions), parent, after, work, catalog))
    except FileNotFoundError:
        version = finished_version(config.output, identity)
        if version is None:
            raise
        log.info("the same job ran elsewhere, and finished version %s first", version.version)
        return {**result_of(version), "made": 0}


@dataclass(frozen=True)
class _Build:
    """What a job is about: the arguments of run_shard_job, and what it keeps.

    `identity`: what the version follows from; `work`: the folder where notes of it lie until it is published;
    `catalog`: its images, on this machine's disk.
    """

    identity: str
    config: ShardConfig
    listing: Listing
    recipe: dict[str, Any]
    unwanted: Selector
    parent: DatasetVersion | None
    after: str | None
    work: str
    catalog: Catalog


def _run(build: _Build) -> dict[str, Any]:
    root, work, catalog, unwanted = build.config.output, build.work, build.catalog, build.unwanted
    if build.parent:
        catalog.add_parent(build.parent.rows())
    memory, refused = _scan(build)
    _tell_excluded(unwanted, catalog)
    coming = _plans(catalog, build.config.shard)
    plans = list(storage.few_at_once(partial(_publish_plan, work), coming, where=work))
    earlier = built_version(root, build.identity)
    if earlier:
        _recall(plans, work, earlier, build.parent)
    made, needed = _write(build, plans, refused=refused)
    version = _publish(build, plans)
    note_build(root, build.identity, version)
    storage.remove_directory(work)
    peak = {"driver_mb": _peak_megabytes(), "worker_mb": max(memory, needed)}
    excluded = {criterion.as_line(): count for criterion, count in unwanted.counts.items() if count}
    return {
        **result_of(version),
        **({"excluded": excluded} if unwanted.counts else {}),
        "made": made,
        "peak_memory": peak,
    }


def _scan(build: _Build) -> tuple[float, int]:
    """Read every file once: its key and size, or why it is refused.

    Returns:
        the workers' peak memory in MB, and how many images were refused.
    """
    listing, work, catalog = build.listing, build.work, build.catalog
    noted = sorted(_names(storage.join(work, "scan")))
    mended = storage.few_at_once(partial(_may_be_mended, work), noted, where=work)
    there = {name for name, again in zip(noted, mended, strict=True) if not again}
    todo = [name for name in listing.chunks if name not in there]

    def publish(name: str) -> None:
        storage.publish_file(listing.folder / f"{name}.jsonl", storage.join(work, "listing", f"{name}.jsonl"))

    for _ in storage.few_at_once(publish, todo, where=work):  # of ten million images they are 20,000
        pass
    answers = run_tasks(
        scan_chunk,
        [{"name": name} for name in todo],
        what="scan",
        images=listing.images,
        done=sum(listing.chunks[name] for name in listing.chunks if name in there),
        num_workers=build.config.scaling.num_workers,
        work=work,
        recipe=build.recipe,
    )
    told = storage.few_at_once(partial(_scanned, work), (name for name in listing.chunks if name in there), where=work)
    refused = sum(_enter(answers_of_one, catalog, build.unwanted) for answers_of_one in told)
    memory = 0.0
    with closing(answers):
        for answer in answers:  # entered while others are looked at
            memory = max(memory, answer["memory"])
            refused += _enter(_scanned(work, answer["name"]), catalog, build.unwanted)
    catalog.exclude_copies()
    _refuse_over_budget(refused, build)
    return memory, refused


def _scanned(work: str, chunk: str) -> list[bytes]:
    """What the headers of a chunk's files told, a line for each."""
    return storage.read_bytes(storage.join(work, "scan", f"{chunk}.jsonl"), at_once=True).splitlines()


def _enter(lines: Sequence[bytes], catalog: Catalog, unwanted: Selector) -> int:
    """Enter what a chunk's headers told into the catalog, which sorts: chunks come in any order.

    Returns:
        how many of its images were refused.
    """
    refused = 0
    for line in lines:
        answer = json.loads(line)
        candidate = Candidate.from_json(answer["candidate"])
        criterion = unwanted.first(row_of(candidate, "excluded")) if unwanted.counts else None
        if criterion:
            reason, _, _ = criterion.as_line().partition(":")
            catalog.exclude(candidate, f"excluded_by_{reason}", criterion.as_line())
        elif answer["refusal"] is None:
            catalog.add(candidate)
        elif catalog.set_outside({**row_of(candidate, "quarantined"), **answer["refusal"]}):
            refused += 1
    return refused


def _tell_excluded(unwanted: Selector, catalog: Catalog) -> None:
    if not unwanted.counts:
        return
    most = sorted(unwanted.counts.items(), key=lambda item: -item[1])[:_TOLD]
    told = ", ".join(f"{count} by {criterion.as_line()}" for criterion, count in most if count)
    log.info("images that are excluded: %s", told or "none")
    if unused := unwanted.unused(Criterion.as_line, unwanted.counts):
        log.warning("warning: %s", unused)
    if catalog.left_in_parent:
        log.warning(
            "warning: %d of them lie in the dataset's shards already: dataset.py remove --exclude takes them out",
            catalog.left_in_parent,
        )


def _may_be_mended(work: str, name: str) -> bool:
    """Whether a file of a chunk could not be read by an earlier start: it is read again."""
    refusals = (json.loads(line)["refusal"] for line in _scanned(work, name))
    return any(refusal and refusal["reason"] in MENDABLE for refusal in refusals)


def scan_chunk(
    job: dict[str, Any], *, board: ray.actor.ActorHandle, work: str, recipe: dict[str, Any]
) -> dict[str, Any]:
    """A task: files of a chunk of the listing to keys and sizes, or refusals."""
    name = job["name"]
    told = Teller(board, name)
    lines = storage.read_bytes(storage.join(work, "listing", f"{name}.jsonl")).splitlines()
    files = [Found.from_json(json.loads(line)) for line in lines]
    answers = []
    with _decoders(work, name, recipe) as (look_at, _):
        read = read_ahead(files, max_bytes=int(recipe["max_megabytes"] * 1e6))
        for found, data in zip(files, read, strict=True):
            answer = look_at(data) if isinstance(data, bytes) else refusal_of(data)
            candidate = _candidate(found, data if isinstance(data, bytes) else b"", answer)
            refused = refused_row(candidate, answer) if isinstance(answer, Refusal) else None
            refusal = {k: refused[k] for k in ("reason", "detail", "thumbnail")} if refused else None
            answers.append(json.dumps({"candidate": candidate, "refusal": refusal}) + "\n")
            told(1, found.bytes, refused is not None)
    storage.publish_bytes(storage.join(work, "scan", f"{name}.jsonl"), "".join(answers).encode())
    told.close()
    return {"name": name, "memory": _peak_megabytes()}


def _candidate(found: Found, data: bytes, answer: Header | Refusal) -> Candidate:
    size = {"width": answer.width, "height": answer.height} if isinstance(answer, Header) else {}
    return Candidate.of(found, data, **size)


def _plans(catalog: Catalog, recipe: RecipeConfig) -> Iterator[ShardPlan]:
    def duplicate(candidate: Candidate) -> None:
        catalog.set_outside(row_of(candidate, "duplicate", "same_bytes"))

    return plan_shards(catalog.candidates(), recipe, duplicate=duplicate)


def _publish_plan(work: str, plan: ShardPlan) -> dict[str, Any]:
    """Store a plan under a name that follows from it: the job of a task."""
    text = plan.to_json().encode()
    name = hashlib.sha256(text).hexdigest()[:24]
    storage.publish_bytes(storage.join(work, "plan", f"{name}.json"), text)
    return {"name": name, "images": len(plan.candidates)}


def _read_plan(work: str, name: str) -> ShardPlan:
    return ShardPlan.from_json(storage.read_bytes(storage.join(work, "plan", f"{name}.json")))


def _recall(plans: list[dict[str, Any]], work: str, version: DatasetVersion, parent: DatasetVersion | None) -> None:
    """Note the shards that a version of the same build has: where some were lost, the others are not made again.

    Args:
        plans: of all shards, in order.
        work: folder of the build.
        version: what the build gave once.
        parent: of the version; its shards are of no plan.
    """
    noted = _names(storage.join(work, "shard"))
    shards = {shard.name: shard for shard in version.shards[len(parent.shards) if parent else 0 :]}
    refused = {(row["source"], row["source_sha256"]): row for row in version.rows() if row["state"] == "quarantined"}
    written = (rows for name, rows in by_shard(version.rows()) if name in shards)
    rows = next(written, [])
    for plan in plans:
        candidates = _read_plan(work, plan["name"]).candidates
        there = {row["key"]: row for row in rows}
        shard = shards[rows[0]["shard"]] if any(one.key in there for one in candidates) else None
        told = [there.get(one.key) or refused.get((one.source, one.sha256)) for one in candidates]
        known = [row for row in told if row and row["reason"] not in MENDABLE]
        whole = shard is None or there.keys() <= {one.key for one in candidates}  # else what was mended moved images
        if shard:
            rows = next(written, [])
        if whole and len(known) == len(candidates) and plan["name"] not in noted:
            publish_note(work, plan["name"], shard, known)


def _write(build: _Build, plans: list[dict[str, Any]], *, refused: int) -> tuple[int, float]:
    """Write the shards that are missing; enter what they refuse.

    Args:
        build: of the job.
        plans: of all shards.
        refused: images that were refused before: one budget is for all.

    Returns:
        how many were written, and the workers' peak memory in MB.
    """
    work, root = build.work, build.config.output

    def enter(rows: list[Row]) -> None:
        nonlocal refused
        for row in rows:
            if row["state"] not in IN_SHARDS and build.catalog.set_outside(row):
                refused += row["state"] == "quarantined"
        _refuse_over_budget(refused, build)

    noted = _names(storage.join(work, "shard"))
    sizes = {entry.path: entry.bytes for entry in storage.walk(storage.join(root, "shards"))} if noted else {}
    there = set()
    for name, shard, rows in notes_of(work, (plan["name"] for plan in plans if plan["name"] in noted)):
        if any(row["reason"] in MENDABLE for row in rows):
            continue
        if shard is None or sizes.get(shard.name) == shard.bytes:  # else it was collected since, and is made again
            there.add(name)
            enter(rows)
    if there:
        log.info("%d of %d shards are there already", len(there), len(plans))
    answers = run_tasks(
        write_and_note,
        [plan for plan in plans if plan["name"] not in there],
        what="shard",
        images=sum(plan["images"] for plan in plans),
        done=sum(plan["images"] for plan in plans if plan["name"] in there),
        num_workers=build.config.scaling.num_workers,
        work=work,
        root=root,
        recipe=build.recipe,
    )
    memory = 0.0
    with closing(answers):  # while the cluster is there, also when the budget ends the job
        for answer in answers:
            memory = max(memory, answer["memory"])
            if answer["refused"]:
                enter(_read_note(work, answer["name"])[2])
    return len(plans) - len(there), memory


def write_and_note(
    job: dict[str, Any], *, board: ray.actor.ActorHandle, work: str, root: str, recipe: dict[str, Any]
) -> dict[str, Any]:
    """A task: a plan to a published shard, and its rows with the shard in a note."""
    allocator.keep()  # an image's pixels come and go; see bench/, row shard
    name = job["name"]
    told = Teller(board, name)
    plan = _read_plan(work, name)
    with _decoders(work, name, recipe) as (_, ingest_one):
        shard, rows = write_shard(plan, root, ingest_one, told)
    publish_note(work, name, shard, rows)
    told.close()
    refused = sum(row["state"] not in IN_SHARDS for row in rows)
    return {"name": name, "refused": refused, "memory": _peak_megabytes()}


@contextmanager
def _decoders(
    work: str, task: str, recipe: dict[str, Any]
) -> Iterator[tuple[Callable[[bytes], Header | Refusal], Ingest]]:
    """`look` and `ingest` of a task: in this process or, if an earlier attempt was killed, in one of their own."""
    check_codecs(recipe)
    settings = settings_of(recipe)
    begun = storage.join(work, "started", task)
    if storage.exists(begun):
        with IsolatedDecoder(settings) as decoder:
            yield decoder.look, decoder.ingest
    else:
        storage.publish_bytes(begun, b"")
        yield partial(look, recipe=settings), partial(ingest, recipe=settings)


def _publish(build: _Build, plans: list[dict[str, Any]]) -> DatasetVersion:
    catalog, work, parent, images = build.catalog, build.work, build.parent, build.listing.images
    shards = list(parent.shards) if parent else []
    notes = []
    for name, shard in noted_shards(work, (plan["name"] for plan in plans)):
        if shard:
            shards.append(shard)
            notes.append(name)

    def rows_in_order() -> Iterator[Row]:
        if parent:
            yield from (row for row in parent.rows() if row["state"] in IN_SHARDS)
        for _, _, rows in notes_of(work, notes):
            yield from (row for row in rows if row["state"] in IN_SHARDS)
        yield from catalog.outside()

    if parent and not catalog.has_news and len(shards) == len(parent.shards):
        log.info("everything is in version %s already", parent.version)
        return parent
    if not shards:
        raise QuarantineBudgetError(
            f"all {images} images were refused or excluded{_examples(catalog)}. Nothing was published"
        )
    return publish_version(
        build.config.output,
        recipe=build.recipe,
        shards=shards,
        rows=rows_in_order(),
        found=images - catalog.known + (parent.books["found"] if parent else 0),
        after=build.after,
        parent=parent,
    )


def publish_note(work: str, name: str, shard: Shard | None, rows: list[Row]) -> None:
    """Note what a task made, for the driver and for a later start."""
    described = json.dumps(asdict(shard) if shard else None).encode()
    with scratch_folder("note") as scratch, storage.full_disk_named(str(scratch)):
        note = scratch / "note.parquet"
        pq.write_table(table_of(rows).replace_schema_metadata({b"shard": described}), note)
        storage.publish_file(note, storage.join(work, "shard", f"{name}.parquet"))


def notes_of(work: str, names: Iterable[str]) -> Iterator[tuple[str, Shard | None, list[Row]]]:
    """Name, shard and rows of what tasks noted, in order."""
    return storage.few_at_once(partial(_read_note, work), names, where=work)


def noted_shards(work: str, names: Iterable[str]) -> Iterator[tuple[str, Shard | None]]:
    """Without the rows, which take most of the time."""

    def read(name: str) -> tuple[str, Shard | None]:
        return name, _shard_in(pq.read_schema(_note(work, name)))

    return storage.few_at_once(read, names, where=work)


def _read_note(work: str, name: str) -> tuple[str, Shard | None, list[Row]]:
    table = pq.read_table(_note(work, name))
    return name, _shard_in(table.schema), list(rows_of(table))


def _note(work: str, name: str) -> pa.BufferReader:
    return pa.BufferReader(storage.read_bytes(storage.join(work, "shard", f"{name}.parquet"), at_once=True))


def _shard_in(note: pa.Schema) -> Shard | None:
    described = json.loads(note.metadata[b"shard"])
    return Shard(**described) if described else None


def _refuse_over_budget(refused: int, build: _Build) -> None:
    budget, images = build.config.budget, build.listing.images
    allowed = max(budget.at_least, int(budget.share * images))
    if refused > allowed:
        raise QuarantineBudgetError(
            f"{refused} of {images} images were refused, {allowed} are allowed{_examples(build.catalog)}. Nothing was "
            "published. Mend the images, or raise --budget.share or --budget.at-least"
        )


def _examples(catalog: Catalog) -> str:
    refused = ", ".join(f"{row['source']} ({row['reason']})" for row in catalog.outside_examples(5))
    return f"; among them: {refused}" if refused else ""  # all may be excluded


def _names(folder: str) -> set[str]:
    return {storage.name_of(uri).partition(".")[0] for uri in storage.list_files(folder)}


def _peak_megabytes() -> float:
    """The most memory that this process has had."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
