"""A model applied to contents x styles on Ray Data: M style packs, then N contents, each encoded once.

No picture passes through the driver. An output is published as soon as it is made, so a job that was broken off, or an
actor that died, makes again at most what was in flight.
"""

import hashlib
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.data import ActorPoolStrategy

from adaconv import storage
from adaconv.config.stylize import StylizeConfig
from adaconv.data.sources import Found, list_images
from adaconv.images import ImageError, decode
from adaconv.orchestration.cluster import quiet_ray_data, require_resources
from adaconv.orchestration.metrics import output_counter
from adaconv.progress import Progress
from adaconv.stylize.gallery import Picture, render
from adaconv.stylize.outputs import Recipe, encode, is_whole, pack_name, publish_index, slug
from adaconv.stylize.pictures import shrink, thumbnail
from adaconv.stylize.style_pack import StylePack
from adaconv.stylize.stylizer import Stylizer

log = logging.getLogger(__name__)

_MODEL_FILES = ("model.safetensors", "model.json")


def run_stylize_job(config: StylizeConfig, *, model: str, folder: Path) -> dict[str, Any]:
    """Make every output that is missing below `config.output`, then its index and gallery.

    Args:
        config: of the job.
        model: the exact version, for recipes.
        folder: local, of the model's files.

    Returns:
        books and paths; `status` is `failed` where a pair could not be made.

    Raises:
        UsageError: no contents or no styles.
        ClusterError: the cluster has not what the actors need.
    """
    scaling = config.scaling
    require_resources(CPU=scaling.num_actors * scaling.cpus_per_actor, GPU=scaling.num_actors * scaling.gpus_per_actor)
    contents = spread(list_images(config.content, flag="--content"), config.limit_contents)
    styles = spread(list_images(config.style, flag="--style"), config.limit_styles)
    log.info("%d contents x %d styles = %d outputs", len(contents), len(styles), len(contents) * len(styles))
    # Actors on other nodes have no such folder: the files travel through the object store.
    files = ray.put({name: (folder / name).read_bytes() for name in _MODEL_FILES})
    shared = {"files": files, "config": config.model_dump_json(), "model": model}

    progress = Progress("style packs", total=len(styles), unit="styles")
    packs: list[dict[str, Any]] = []
    for row in _on_actors(_PackMaker, _numbered(styles), shared, config):
        packs.append(row)
        progress.advance()
    progress.close()
    packs.sort(key=lambda row: row["index"])

    progress = Progress("stylize", total=len(contents) * len(styles))
    rows: list[dict[str, Any]] = []
    states = {"done": 0, "skipped": 0, "failed": 0}
    counter = output_counter()
    for row in _on_actors(_ContentStylizer, _numbered(contents), {**shared, "packs": ray.put(packs)}, config):
        rows.append(row)
        states[row["state"]] += 1
        counter.inc(1, {"state": row["state"]})
        progress.advance(skipped=states["skipped"], failed=states["failed"])
    progress.close()
    rows.sort(key=lambda row: (row["content_index"], row["style_index"]))
    assert len(rows) == len(contents) * len(styles), "every pair ends in the books"
    return _close_books(config, model, rows, packs, states)


def spread(found: list[Found], limit: int | None) -> list[Found]:
    """At most `limit` of them, evenly over the sorted list: folders of styles are all touched before one is emptied."""
    if limit is None or limit >= len(found):
        return found
    return [found[position * len(found) // limit] for position in range(limit)]


def _numbered(found: Sequence[Found]) -> list[dict[str, Any]]:
    return [{"index": index, **asdict(image)} for index, image in enumerate(found)]


def _on_actors(
    actor: type, items: list[dict[str, Any]], shared: dict[str, Any], config: StylizeConfig
) -> Iterable[dict[str, Any]]:
    """One item at a time to each actor; answers come as they are ready."""
    quiet_ray_data()
    scaling = config.scaling
    threads = scaling.threads_per_actor
    if threads is None and not scaling.gpus_per_actor:
        threads = max(1, (os.cpu_count() or 1) // scaling.num_actors)
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        mapped = dataset.flat_map(
            actor,
            fn_constructor_kwargs={**shared, "threads": threads, "on_gpu": bool(scaling.gpus_per_actor)},
            compute=ActorPoolStrategy(size=min(scaling.num_actors, len(items))),
            num_cpus=scaling.cpus_per_actor,
            num_gpus=scaling.gpus_per_actor or None,
        )
    answers: Iterable[dict[str, Any]] = mapped.iter_rows()
    return answers


class _ModelActor:
    """Holds the model."""

    def __init__(self, *, files: ray.ObjectRef, config: str, model: str, threads: int | None, on_gpu: bool) -> None:
        import torch

        if threads:
            torch.set_num_threads(threads)
        self.config, self.model = StylizeConfig.model_validate_json(config), model
        with tempfile.TemporaryDirectory(prefix="adaconv-model-") as scratch:
            for name, data in ray.get(files).items():
                (Path(scratch) / name).write_bytes(data)
            self.stylizer = Stylizer.from_folder(
                scratch, device="cuda" if on_gpu else "cpu", precision=self.config.options.precision
            )


class _PackMaker(_ModelActor):
    """A style to its pack, in storage."""

    def __call__(self, style: dict[str, Any]) -> list[dict[str, Any]]:
        row = {"index": style["index"], "source": style["source"], "uri": "", "digest": "", "reason": ""}
        row |= {"sha256": "", "thumbnail": b""}
        try:
            data = storage.read_bytes(style["uri"])
            row["sha256"] = hashlib.sha256(data).hexdigest()
            picture = decode(data)
            pack = self.stylizer.style_pack(
                picture,
                side=self.config.options.style_side,
                source=style["source"],
                source_sha256=row["sha256"],
            )
        except (ImageError, OSError) as error:
            return [row | {"reason": f"style {error}"}]
        row["digest"] = pack.digest
        row["uri"] = storage.join(self.config.output, pack_name(style["source"], pack.digest))
        if not storage.exists(row["uri"]):
            storage.publish_bytes(row["uri"], pack.to_bytes())
        if style["index"] < self.config.gallery.max_styles:
            row["thumbnail"] = thumbnail(picture, side=self.config.gallery.thumbnail_side)
        return [row]


class _ContentStylizer(_ModelActor):
    """A content to its outputs with all styles."""

    def __init__(self, *, packs: ray.ObjectRef, **shared: Any) -> None:
        super().__init__(**shared)
        self.styles: list[dict[str, Any]] = ray.get(packs)
        digest = self.stylizer.info.digest
        self.packs = {
            style["index"]: StylePack.from_bytes(
                storage.read_bytes(style["uri"]), name=style["uri"], model_digest=digest
            )
            for style in self.styles
            if not style["reason"]
        }

    def __call__(self, content: dict[str, Any]) -> list[dict[str, Any]]:
        sha256, reason, picture = "", "", None
        try:
            data = storage.read_bytes(content["uri"])
            sha256 = hashlib.sha256(data).hexdigest()
            picture = shrink(decode(data), self.config.options.content_side)
        except (ImageError, OSError) as error:
            reason = f"content {error}"
        rows = [self._row(content, sha256, style, reason) for style in self.styles]
        if picture is None:
            return rows
        shown = content["index"] < self.config.gallery.max_contents
        if shown:
            rows[0]["content_thumbnail"] = thumbnail(picture, side=self.config.gallery.thumbnail_side)
        todo = []
        for row, style in zip(rows, self.styles, strict=True):
            if row["state"] == "failed":
                continue
            recipe = self._recipe(content, sha256, style)
            row |= {"output": recipe.name, "width": picture.width, "height": picture.height}
            if is_whole(storage.join(self.config.output, recipe.name)):
                row["state"] = "skipped"
            else:
                todo.append((row, recipe))
        packs = [self.packs[row["style_index"]] for row, _ in todo]
        began = time.monotonic()
        for (row, recipe), stylized in zip(todo, self.stylizer.stylize_all(picture, packs), strict=True):
            storage.publish_bytes(storage.join(self.config.output, recipe.name), encode(stylized, recipe))
            row |= {"state": "done", "seconds": time.monotonic() - began}
            began = time.monotonic()
            if self._is_shown(row):
                row["thumbnail"] = thumbnail(stylized, side=self.config.gallery.thumbnail_side)
        for row in rows:
            if row["state"] == "skipped" and self._is_shown(row):
                made = decode(storage.read_bytes(storage.join(self.config.output, row["output"])))
                row["thumbnail"] = thumbnail(made, side=self.config.gallery.thumbnail_side)
        return rows

    def _is_shown(self, row: dict[str, Any]) -> bool:
        gallery = self.config.gallery
        return bool(row["content_index"] < gallery.max_contents and row["style_index"] < gallery.max_styles)

    def _row(self, content: dict[str, Any], sha256: str, style: dict[str, Any], reason: str) -> dict[str, Any]:
        reason = reason or style["reason"]
        return {
            "content_index": content["index"],
            "style_index": style["index"],
            "output": "",
            "state": "failed" if reason else "",
            "reason": reason,
            "content": content["source"],
            "content_sha256": sha256,
            "style": style["source"],
            "style_sha256": style["sha256"],
            "width": 0,
            "height": 0,
            "seconds": 0.0,
            "thumbnail": b"",
            "content_thumbnail": b"",
        }

    def _recipe(self, content: dict[str, Any], sha256: str, style: dict[str, Any]) -> Recipe:
        return Recipe(
            content=content["source"],
            content_sha256=sha256,
            style=style["source"],
            style_sha256=style["sha256"],
            pack_digest=style["digest"],
            model=self.model,
            model_digest=self.stylizer.info.digest,
            options=self.config.options.model_dump(mode="json"),
        )


def _close_books(
    config: StylizeConfig,
    model: str,
    rows: list[dict[str, Any]],
    packs: list[dict[str, Any]],
    states: dict[str, int],
) -> dict[str, Any]:
    index = publish_index(config.output, rows)
    gallery = storage.join(config.output, "gallery.html")
    storage.publish_bytes(gallery, _gallery(config, model, rows, packs, states).encode())
    result: dict[str, Any] = {
        "model": model,
        "books": {"pairs": len(rows), **states},
        "images": storage.join(config.output, "images"),
        "index": index,
        "gallery": gallery,
    }
    if states["failed"]:
        failures = sorted({row["reason"] + f" ({_culprit(row)})" for row in rows if row["state"] == "failed"})
        result |= {
            "status": "failed",
            "failures": failures,
            "error": f"{states['failed']} of {len(rows)} outputs could not be made: {'; '.join(failures[:5])}; "
            f"the others are in {config.output}, the index names all",
        }
    return result


def _culprit(row: dict[str, Any]) -> str:
    return str(row["content"] if row["reason"].startswith("content") else row["style"])


def _gallery(
    config: StylizeConfig,
    model: str,
    rows: list[dict[str, Any]],
    packs: list[dict[str, Any]],
    states: dict[str, int],
) -> str:
    contents: dict[int, Picture] = {}
    cells = {}
    for row in rows:
        if row["content_index"] >= config.gallery.max_contents:
            continue
        if row["content_thumbnail"] or row["content_index"] not in contents:
            contents[row["content_index"]] = Picture(row["content_thumbnail"], row["content"])
        if row["thumbnail"]:
            title = f"{slug(row['content'])} in the style of {slug(row['style'])}"
            cells[row["content_index"], row["style_index"]] = Picture(row["thumbnail"], title, row["output"])
    styles = [Picture(pack["thumbnail"], pack["source"]) for pack in packs[: config.gallery.max_styles]]
    shown, pairs = len(contents) * len(styles), len(rows)
    return render(
        title="Stylized images",
        facts={
            "model": model,
            "outputs": f"{pairs}: {states['done']} made, {states['skipped']} there before, {states['failed']} failed",
        },
        contents=[contents[index] for index in sorted(contents)],
        styles=styles,
        cells=cells,
        note=f"The first {shown} of {pairs} outputs; index.parquet lists all." if shown < pairs else "",
    )
