"""A model applied to contents x styles on Ray Data: M style packs, then N contents, each encoded once.

No picture passes through the driver, but for the gallery's thumbnails. An output is published as soon as it is made, so
a job that was broken off, or an actor that died, makes again at most what was in flight.
"""

import io
import json
import logging
import os
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import ray
from PIL import Image
from ray.data import ActorPoolStrategy
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from adaconv import checkpoint, storage
from adaconv.config.stylize import StylizeConfig
from adaconv.errors import AdaConvError, JobError, UsageError
from adaconv.images import ImageError
from adaconv.orchestration.board import Board, Teller
from adaconv.orchestration.cluster import require_resources, set_up_ray_data
from adaconv.orchestration.metrics import output_counter
from adaconv.orchestration.stylize_plan import Plan
from adaconv.orchestration.tasks import plain_errors, raise_cause
from adaconv.progress import Progress, repeatedly
from adaconv.scratch import scratch_folder
from adaconv.stylize.books import Books, culprit
from adaconv.stylize.gallery import Failure, Picture, render
from adaconv.stylize.inputs import Item, decode_picture, local_file, mixture_of, read_item, reading_order, sha256_of
from adaconv.stylize.outputs import INDEX, Published, Recipe, hash_of, pack_name, publish_index, slug
from adaconv.stylize.pictures import thumbnail
from adaconv.stylize.production import Limits, Made, Production, Wanted, file_thumbnail, is_out_of_memory
from adaconv.stylize.style_pack import StylePack
from adaconv.stylize.stylizer import Stylizer

log = logging.getLogger(__name__)

_DEATHS_ADMITTED = 5  # of workers at one picture, before it is named a failure
_PACKS_AT_HAND = 512  # of an actor; 100 kB each for the paper's network
_ASK_SECONDS = 2.0
_PAIRS_AT_ONCE = 256  # of a content that one actor makes before another may take the rest
_BLOCKS_AT_MOST = 4096  # of jobs that actors are handed: Ray takes 12 ms for one, whatever it holds
_SHOWN = 100  # kinds of failure that result.json lists

Row = dict[str, Any]


def run_stylize_job(config: StylizeConfig, plan: Plan, *, model: str, folder: Path) -> dict[str, Any]:
    """Make every output that is missing below `config.output`, then its index and gallery.

    Args:
        config: of the job.
        plan: of the same configuration.
        model: the exact version, for recipes.
        folder: local, of the model's files.

    Returns:
        books and paths; `status` is `failed` where more pairs could not be made than the budget allows.

    Raises:
        UsageError: a style pack of another model.
        ClusterError: the cluster has not what the actors need.
    """
    log.info("%s", plan)
    num_actors = _num_actors(config)
    scaling = config.scaling
    require_resources(CPU=num_actors * scaling.cpus_per_actor, GPU=num_actors * scaling.gpus_per_actor)
    # Actors on other nodes have no such folder: the files travel through the object store.
    files = ray.put({name: (folder / name).read_bytes() for name in checkpoint.MODEL_FILES})
    # Beside the driver, which is lost with it anyway: on another node it would be one more thing to lose.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Should it die all the same, calls wait for the next one, which counts anew.
    lasting = {"max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    beginnings = ray.remote(_Beginnings).options(num_cpus=0, **lasting).remote()
    named = checkpoint.public_name(model)
    shared = {"files": files, "config": config.model_dump_json(), "model": named, "beginnings": beginnings}
    columns = _columns_of_shown(plan, config)
    packs = _make_packs(plan, columns, config, num_actors, shared)
    with scratch_folder("books", config.tile.scratch) as aside, Books(aside / "rows", len(plan.pairs)) as books:
        there = Published.of(str(config.output))
        shown = _make_outputs(plan, columns, packs, there, books, config, num_actors, shared)
        return _close_books(config, model, books, shown, packs, there)


def _num_actors(config: StylizeConfig) -> int:
    """As told, or as many as the cluster's CPUs or GPUs and memory allow, and one at least."""
    scaling = config.scaling
    if scaling.num_actors is not None:
        return scaling.num_actors
    there = ray.cluster_resources()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    # A local cluster may lend its cores twice; models do not gain by it.
    cpus = min(there.get("CPU", 1), os.cpu_count() or 1) if len(nodes) == 1 else there.get("CPU", 1)
    if scaling.gpus_per_actor:
        return max(1, int(there.get("GPU", 0) / scaling.gpus_per_actor))
    by_memory = there.get("memory", 0) / (config.tile.max_memory_gb * 1e9)
    return max(1, int(min(cpus / scaling.cpus_per_actor, by_memory)))


def _make_packs(
    plan: Plan, columns: Mapping[int, int], config: StylizeConfig, num_actors: int, shared: Row
) -> list[Row]:
    """A row for each style and side at which some pair reads it."""
    default = config.options.style_side
    needed = sorted({(pair.style, int(pair.options.get("style_side", default))) for pair in plan.pairs})
    shown = {plan.pairs[number].style for number in columns}
    jobs = [
        {"style": style, "side": side, "shown": style in shown, **plan.styles[style].to_row()} for style, side in needed
    ]
    progress = Progress("style packs", total=len(jobs), unit="styles")
    packs = []
    for row in _on_actors(_PackMaker, jobs, shared, config, num_actors):
        packs.append(row)
        progress.advance()
    progress.close()
    return sorted(packs, key=lambda row: (row["style"], row["side"]))


def _make_outputs(
    plan: Plan,
    columns: Mapping[int, int],
    packs: list[Row],
    there: Published,
    books: Books,
    config: StylizeConfig,
    num_actors: int,
    shared: Row,
) -> list[Row]:
    """Enter a row for each pair.

    Returns:
        those that the gallery shows, in the plan's order.
    """
    jobs = []
    for content, group in groupby(enumerate(plan.pairs), key=lambda numbered: numbered[1].content):
        numbered = [(number, pair.style, dict(pair.options)) for number, pair in group]
        for start in range(0, len(numbered), _PAIRS_AT_ONCE):
            pairs = json.dumps(numbered[start : start + _PAIRS_AT_ONCE])
            jobs.append({"content": content, "pairs": pairs, **plan.contents[content].to_row()})
    handed = {**shared, "packs": ray.put(packs), "shown": ray.put(set(columns)), "there": ray.put(there)}
    progress = Progress("stylize", total=len(plan.pairs))
    counter = output_counter()
    shown: list[Row] = []
    board = shared["beginnings"]
    with _told_ahead(progress, board):
        for row in _on_actors(_ContentStylizer, jobs, handed, config, num_actors):
            if row["number"] == row["job"]:
                board.forget.remote(str(row["job"]))
            books.enter(row["number"], {name: row[name] for name in INDEX.names})
            if row["number"] in columns:
                shown.append(row | {"column": columns[row["number"]]})
            counter.inc(1, {"state": row["state"]})
            counts = {state: books.states[state] for state in ("skipped", "failed")}
            progress.advance(free=row["state"] == "skipped", **counts)
    progress.close()
    return sorted(shown, key=lambda row: row["number"])


@contextmanager
def _told_ahead(progress: Progress, board: ray.actor.ActorHandle) -> Iterator[None]:
    """Rows of a job come all at once, and a job of large pictures takes an hour: count what actors tell of before."""

    def ask() -> None:
        with suppress(ray.exceptions.RayError):
            progress.look_ahead(ray.get(board.totals.remote(), timeout=10)[0])

    try:
        with repeatedly(ask, seconds=_ASK_SECONDS):
            yield
    finally:
        progress.look_ahead(0)


def _columns_of_shown(plan: Plan, config: StylizeConfig) -> dict[int, int]:
    """The pairs that the gallery shows, by number, and their columns: one for each style and own options.

    Of the contents and columns that are paired it takes the first, wherever they are in their lists.
    """
    contents: dict[int, int] = {}
    columns: dict[tuple[int, str], int] = {}
    shown: dict[int, int] = {}
    for number, pair in enumerate(plan.pairs):
        row = contents.setdefault(pair.content, len(contents))
        if row >= config.gallery.max_contents or len(shown) >= config.gallery.max_outputs:
            break
        options = json.dumps(dict(pair.options), sort_keys=True) if pair.options else "{}"
        column = columns.setdefault((pair.style, options), len(columns))
        if column < config.gallery.max_styles:
            shown[number] = column
    return shown


def _on_actors(actor: type, jobs: list[Row], shared: Row, config: StylizeConfig, num_actors: int) -> Iterator[Row]:
    """One job at a time to each actor, a few where there are very many; answers come as they are ready.

    Raises:
        AdaConvError, OSError: what an actor raised.
    """
    set_up_ray_data()
    scaling = config.scaling
    threads = scaling.threads_per_actor
    if threads is None and not scaling.gpus_per_actor:
        threads = max(1, (os.cpu_count() or 1) // num_actors)
    reserved: Row = {}
    memory = config.tile.max_memory_gb * 1e9
    if not scaling.gpus_per_actor and num_actors * memory <= ray.cluster_resources().get("memory", 0):
        reserved["memory"] = memory  # so that no node is given more actors than it can feed
    jobs = sorted(jobs, key=reading_order)
    dataset = ray.data.from_items(jobs, override_num_blocks=min(len(jobs), _BLOCKS_AT_MOST))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        mapped = dataset.flat_map(
            actor,
            fn_constructor_kwargs={**shared, "threads": threads, "on_gpu": bool(scaling.gpus_per_actor)},
            compute=ActorPoolStrategy(size=min(num_actors, len(jobs))),
            num_cpus=scaling.cpus_per_actor,
            num_gpus=scaling.gpus_per_actor or None,
            **reserved,
        )
    try:
        for row in mapped.iter_rows():
            if row["error"]:
                raise UsageError(row["error"]) if row["usage"] else JobError(row["error"])
            yield row
    except ray.exceptions.RayTaskError as error:
        raise_cause(error)


class _Beginnings(Board):
    """How often each style and content was begun, once more than workers died at it; and outputs of jobs on the way."""

    def __init__(self) -> None:
        super().__init__()
        self._of: dict[str, int] = {}

    def begin(self, job: str) -> int:
        self._of[job] = self._of.get(job, 0) + 1
        return self._of[job]

    def end(self, jobs: Sequence[str]) -> None:
        for job in jobs:
            self._of.pop(job, None)


class _ModelActor:
    """Holds the model, which is loaded when it is first needed."""

    def __init__(
        self,
        *,
        files: ray.ObjectRef,
        config: str,
        model: str,
        beginnings: ray.actor.ActorHandle,
        threads: int | None,
        on_gpu: bool,
    ) -> None:
        self.config, self.model = StylizeConfig.model_validate_json(config), model
        self._files, self._threads, self._on_gpu = files, threads, on_gpu
        self._beginnings, self._begun = beginnings, list[str]()
        assert self.config.output is not None
        self.output = self.config.output
        self.scratch = Path(self.config.tile.scratch) if self.config.tile.scratch else None

    def begin(self, what: str) -> int:
        """Note that this was begun; how many workers died at it so far.

        Raises:
            ImageError: `worker_died`: too many.
        """
        deaths: int = ray.get(self._beginnings.begin.remote(what)) - 1
        if deaths >= _DEATHS_ADMITTED:
            raise ImageError("worker_died", f"{deaths} workers died at it; its decoder, or memory that ran out")
        self._begun.append(what)
        return deaths

    def end(self) -> None:
        """What was begun has its answer: who dies later dies of another job, though Ray begins all of a block anew."""
        self._beginnings.end.remote(self._begun)
        self._begun = []

    @cached_property
    def stylizer(self) -> Stylizer:
        import torch

        if self._threads:
            torch.set_num_threads(self._threads)
        with scratch_folder("model") as folder:
            for name, data in ray.get(self._files).items():
                (folder / name).write_bytes(data)
            return Stylizer.from_folder(
                folder,
                device="cuda" if self._on_gpu else "cpu",
                precision=self.config.options.precision,
                max_memory_gb=self.config.tile.max_memory_gb,
                scratch=self.scratch,
            )


class _PackMaker(_ModelActor):
    """A style to its pack, in storage."""

    @plain_errors()
    def __call__(self, job: Row) -> list[Row]:
        item = Item.from_row({name: value for name, value in job.items() if name not in ("style", "side", "shown")})
        row = {"style": job["style"], "side": job["side"], "source": item.source, "uri": "", "digest": "", "reason": ""}
        row |= {"sha256": "", "thumbnail": b"", "model_digest": "", "read_at": job["side"], "error": "", "usage": False}
        try:
            self.begin(f"style {job['style']} {job['side']}")
            pack = self._pack(item, job["side"])
        except (ImageError, FileNotFoundError) as error:
            return [row | {"reason": f"style {error}"}]
        except AdaConvError as error:
            return [row | {"error": str(error), "usage": isinstance(error, UsageError)}]
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            told = str(error).partition("\n")[0]
            return [row | {"reason": f"style out_of_memory: {told}; give actors more memory, or a smaller style_side"}]
        finally:
            self.end()
        row |= {
            # Of a style that lies twice the pack is one, and called as it was found first.
            "source": (pack.source or item.source) if item.kind == "pack" else item.source,
            # A ready pack was read at its own side; images of a mixture are read at that of the job.
            "read_at": pack.side if item.kind == "pack" else job["side"],
            "sha256": pack.source_sha256,
            "digest": pack.digest,
            "model_digest": pack.model_digest,
        }
        row["uri"] = self._keep(pack, row["source"])
        if job["shown"] and pack.thumbnail:
            shown = Image.open(io.BytesIO(pack.thumbnail))
            row["thumbnail"] = thumbnail(shown, side=self.config.gallery.thumbnail_side)
        return [row]

    def _pack(self, item: Item, side: int) -> StylePack:
        digest = self.stylizer.info.digest
        if item.kind == "pack":
            return StylePack.from_bytes(read_item(item), name=item.source, model_digest=digest)
        if item.kind == "mixture":
            return mixture_of(item, lambda part: self._part(part, side))
        with scratch_folder("style", self.scratch) as folder:
            path = local_file(item, folder)
            sha256 = sha256_of(path)
            known = StylePack({}, digest, item.source, sha256, {"side": side})
            uri = storage.join(self.output, pack_name(item.source, known.digest))
            if storage.exists(uri):
                return StylePack.from_bytes(storage.read_bytes(uri), name=uri, model_digest=digest)
            picture = decode_picture(path, max_pixels=int(self.config.tile.max_megapixels * 1e6))
            return self.stylizer.style_pack(picture, side=side, source=item.source, source_sha256=sha256)

    def _part(self, item: Item, side: int) -> StylePack:
        """Kept as well: other mixtures may have it too."""
        pack = self._pack(item, side)
        self._keep(pack, pack.source or item.source)
        return pack

    def _keep(self, pack: StylePack, source: str) -> str:
        """The URI of the pack in storage."""
        uri = storage.join(self.output, pack_name(source, pack.digest))
        if not storage.exists(uri):
            storage.publish_bytes(uri, pack.to_bytes())
        return uri


class _ContentStylizer(_ModelActor):
    """A content to its outputs."""

    def __init__(self, *, packs: ray.ObjectRef, shown: ray.ObjectRef, there: ray.ObjectRef, **shared: Any) -> None:
        super().__init__(**shared)
        self.styles: dict[tuple[int, int], Row] = {(row["style"], row["side"]): row for row in ray.get(packs)}
        self.shown: set[int] = ray.get(shown)
        self.there: Published = ray.get(there)
        # On an object store the listing knew all: to look for each would take two requests. What was made since, by an
        # actor that died, is begun anew by the one that took its place.
        self._look = storage.is_local(self.output) or ray.get_runtime_context().was_current_actor_reconstructed
        self._read_pack = lru_cache(_PACKS_AT_HAND)(self._read_pack_anew)

    @plain_errors()
    def __call__(self, job: Row) -> list[Row]:
        item = Item.from_row({name: value for name, value in job.items() if name not in ("content", "pairs")})
        pairs = json.loads(job["pairs"])
        shown = next((number for number, _, _ in pairs if number in self.shown), None)
        sha256, thumbnail_of_content, reason = "", b"", ""
        made: dict[int, Made] = {}
        recipes: dict[int, Recipe] = {}
        firsts: dict[str, int] = {}  # an output that several pairs have is made once, for the first
        try:
            with scratch_folder("content", self.scratch) as folder:
                path = local_file(item, folder)
                sha256 = sha256_of(path)
                recipes = {n: r for n, style, o in pairs if (r := self._recipe(item, sha256, style, o)) is not None}
                for number, recipe in recipes.items():
                    firsts.setdefault(recipe.name, number)
                # What is left is part of the name: who dies after having made something has not died of the content.
                name, told = f"content {job['content']} {pairs[0][0]}", Teller(self._beginnings, str(pairs[0][0]))
                wanted = self._wanted(pairs, recipes, firsts)
                for output in self._make(path, wanted, lambda left: self.begin(f"{name}, {left} left")):
                    made[output.key] = output  # and stays so, whatever comes after
                    told(1, 0, False)
                if shown is not None:
                    thumbnail_of_content = file_thumbnail(path, side=self.config.gallery.thumbnail_side)
        except (ImageError, FileNotFoundError) as error:
            reason = f"content {error}"
        except AdaConvError as error:
            return [{"error": str(error), "usage": isinstance(error, UsageError)}]
        finally:
            self.end()
        rows: list[Row] = []
        for number, style, options in pairs:
            of_style = self._style(style, options)
            first = firsts[recipes[number].name] if number in recipes else number
            one = made.get(first) or Made(number, "failed", reason)
            if one.state == "done" and first != number:
                one = replace(one, state="skipped", seconds=0.0)
            failed = of_style["reason"] or one.reason
            rows.append(
                {
                    "number": number,
                    "job": pairs[0][0],
                    "content_index": job["content"],
                    "style_index": style,
                    "output": recipes[number].name if number in recipes and not failed else "",
                    "state": "failed" if failed else one.state,
                    "reason": failed,
                    "content": item.source,
                    "content_sha256": sha256,
                    "style": of_style["source"],
                    "style_sha256": of_style["sha256"],
                    "model_digest": of_style["model_digest"],
                    "options": json.dumps(options, sort_keys=True),
                    "width": one.width,
                    "height": one.height,
                    "tile": one.tile or 0,
                    "seconds": one.seconds,
                    "thumbnail": one.thumbnail,
                    "content_thumbnail": thumbnail_of_content if number == shown else b"",
                    "error": "",
                    "usage": False,
                }
            )
        return rows

    def _wanted(self, pairs: Sequence[Any], recipes: Mapping[int, Recipe], firsts: Mapping[str, int]) -> list[Wanted]:
        shown = {recipe.name for number, recipe in recipes.items() if number in self.shown}
        return [
            Wanted(number, recipe, partial(self._pack, style, options), recipe.name in shown)
            for number, style, options in pairs
            if (recipe := recipes.get(number)) and firsts[recipe.name] == number
        ]

    def _make(self, path: Path, wanted: Sequence[Wanted], begin: Callable[[int], int]) -> Iterator[Made]:
        tile, scaling = self.config.tile, self.config.scaling
        limits = Limits(
            batch_size=scaling.batch_size,
            writers=max(1, int(scaling.cpus_per_actor)),
            tile=tile.side,
            max_megapixels=tile.max_megapixels,
            scratch=self.scratch,
            thumbnail_side=self.config.gallery.thumbnail_side,
        )
        production = Production(lambda: self.stylizer, self.output, limits, self.there, look=self._look)
        yield from production.make(path, wanted, begin=begin)

    def _style(self, style: int, options: Mapping[str, Any]) -> Row:
        return self.styles[style, int(options.get("style_side", self.config.options.style_side))]

    def _pack(self, style: int, options: Mapping[str, Any]) -> StylePack:
        return self._read_pack(self._style(style, options)["uri"])

    def _read_pack_anew(self, uri: str) -> StylePack:
        return StylePack.from_bytes(storage.read_bytes(uri), name=uri, model_digest=self.stylizer.info.digest)

    def _recipe(self, content: Item, sha256: str, style: int, options: Mapping[str, Any]) -> Recipe | None:
        """None where the style has no pack."""
        row = self._style(style, options)
        if row["reason"]:
            return None
        return Recipe(
            content=content.source,
            content_sha256=sha256,
            style=row["source"],
            style_sha256=row["sha256"],
            pack_digest=row["digest"],
            model=self.model,
            model_digest=row["model_digest"],
            options={**self.config.options.model_dump(mode="json"), **options, "style_side": row["read_at"]},
        )


def _close_books(
    config: StylizeConfig, model: str, books: Books, shown: list[Row], packs: list[Row], there: Published
) -> dict[str, Any]:
    assert config.output is not None
    _sweep(config.output)
    hashes = array("Q")
    index = publish_index(config.output, _noting(books.rows(), hashes))
    listed = Published.listed(config.output) if storage.is_local(config.output) else there
    if others := listed.others(hashes):
        log.info("%d more files in %s/images are of other models, options or pairs; they stay", others, config.output)
    gallery = storage.join(config.output, "gallery.html")
    storage.publish_bytes(gallery, _gallery(config, model, books, shown, packs).encode())
    states = {state: books.states[state] for state in ("done", "skipped", "failed")}
    pairs = sum(states.values())
    assert pairs == sum(books.states.values())
    result: dict[str, Any] = {
        "model": model,
        "books": {"pairs": pairs, **states},
        "images": storage.join(config.output, "images"),
        "index": index,
        "gallery": gallery,
    }
    if states["failed"]:
        failures = sorted(books.failures)
        result["failures"] = failures[:_SHOWN]
        if states["failed"] > config.budget.share * pairs:
            result |= {
                "status": "failed",
                "error": f"{states['failed']} of {pairs} outputs could not be made: {'; '.join(failures[:5])}"
                + (f"; and {len(failures) - 5} more" if len(failures) > 5 else "")
                + f"; the others are in {config.output}, the index names all",
            }
    return result


def _noting(rows: Iterable[Row], hashes: "array[int]") -> Iterator[Row]:
    """The rows as they are; hashes of outputs' names are added."""
    for row in rows:
        if row["output"]:
            hashes.append(hash_of(row["output"]))
        yield row


def _sweep(output: str) -> None:
    """Of what killed processes were writing; an object store has nothing that is half-written."""
    if storage.is_local(output):
        root = Path(output)
        for folder in (root, *root.glob("images/*"), root / "styles"):
            storage.sweep(folder)


def _gallery(config: StylizeConfig, model: str, books: Books, shown: list[Row], packs: list[Row]) -> str:
    contents: dict[int, Picture] = {}
    columns: dict[int, Picture] = {}
    cells: dict[tuple[int, int], Picture | Failure] = {}
    of_style = {pack["style"]: pack for pack in packs}
    for row in shown:
        content, column = row["content_index"], row["column"]
        if row["content_thumbnail"] or content not in contents:
            contents[content] = Picture(row["content_thumbnail"], row["content"])
        how = ", ".join(f"{name} {value}" for name, value in json.loads(row["options"]).items())
        title = row["style"] + (f" · {how}" if how else "")
        columns[column] = Picture(of_style[row["style_index"]]["thumbnail"], title)
        if row["state"] == "failed":
            cells[content, column] = Failure(f"{row['reason']} ({culprit(row)})")
        else:
            told = f"{slug(row['content'])} in the style of {slug(row['style'])}" + (f", {how}" if how else "")
            cells[content, column] = Picture(row["thumbnail"], told, row["output"])
    downs = {content: place for place, content in enumerate(sorted(contents))}
    acrosses = {column: place for place, column in enumerate(sorted(columns))}
    states, pairs = books.states, sum(books.states.values())
    return render(
        title="Stylized images",
        facts={
            "model": model,
            "outputs": f"{pairs}: {states['done']} made, {states['skipped']} there before, {states['failed']} failed",
        },
        contents=[contents[content] for content in downs],
        styles=[columns[column] for column in acrosses],
        cells={(downs[content], acrosses[column]): cell for (content, column), cell in cells.items()},
        note=f"The first {len(cells)} of {pairs} outputs; index.parquet lists all." if len(cells) < pairs else "",
    )
