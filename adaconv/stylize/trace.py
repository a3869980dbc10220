"""Which outputs show some images, or come of a model that was trained on them."""

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow.parquet as pq

from adaconv import storage
from adaconv.errors import UsageError
from adaconv.stylize.outputs import read_recipe

_COLUMNS = ["output", "content_sha256", "style_sha256", "model_digest"]


@dataclass(frozen=True)
class TracedOutput:
    """`by`: what of it they are, `content`, `style`, or only in what its `model` was trained on."""

    uri: str
    by: Literal["content", "style", "model"]


def trace_outputs(root: str, sha256: Set[str], model_digests: Set[str]) -> Iterator[TracedOutput]:
    """Outputs below a job's folder, by its index; one that a later job's index no longer names, by its own recipe.

    A style that was mixed of several is found by each of them.

    Raises:
        UsageError: there are no outputs, or one carries no recipe.
    """
    found = [f"images/{entry.path}" for entry in storage.walk(storage.join(root, "images"))]
    if not found:
        raise UsageError(
            f"--stylized {root}: expected the output folder of pipelines/stylize.py, found no images in it"
        )
    indexed = {row["output"]: row for row in _index(root)}
    for name in sorted(found):
        uri = storage.join(root, name)
        row = indexed.get(name) or _of_recipe(uri)
        if row["content_sha256"] in sha256:
            yield TracedOutput(uri, "content")
        elif not sha256.isdisjoint(row["style_sha256"].split("+")):
            yield TracedOutput(uri, "style")
        elif row["model_digest"] in model_digests:
            yield TracedOutput(uri, "model")


def _index(root: str) -> list[dict[str, Any]]:
    uri = storage.join(root, "index.parquet")
    if not storage.exists(uri):  # of a job that goes on, or was broken off
        return []
    with storage.open_binary(uri) as file:
        return pq.read_table(file, columns=_COLUMNS).to_pylist()  # type: ignore[no-any-return]


def _of_recipe(uri: str) -> dict[str, Any]:
    recipe = read_recipe(storage.read_bytes(uri), name=uri)
    if recipe is None:
        raise UsageError(f"{uri}: expected an output of pipelines/stylize.py, found a picture without recipe")
    return recipe.__dict__
