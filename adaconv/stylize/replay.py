"""An output made again from the recipe that it carries, and compared byte for byte."""

import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from PIL import ImageChops, ImageStat

from adaconv import checkpoint, storage
from adaconv.errors import UsageError
from adaconv.images import ImageError, decode
from adaconv.scratch import scratch_folder
from adaconv.stylize.inputs import (
    Item,
    decode_picture,
    list_items,
    local_file,
    mixture_of,
    read_item,
    reading_order,
    sha256_of,
)
from adaconv.stylize.outputs import Recipe, pack_name, read_recipe
from adaconv.stylize.production import Limits, Options, Production, Wanted
from adaconv.stylize.style_pack import StylePack
from adaconv.stylize.stylizer import Stylizer

log = logging.getLogger(__name__)


def replay(
    uri: str,
    *,
    resolved: Callable[[str], AbstractContextManager[tuple[str, Path]]],
    model: str = "",
    content: Sequence[str],
    style: Sequence[str] = (),
    scratch: str | None = None,
) -> dict[str, Any]:
    """Make an output again.

    Args:
        uri: of the output, local or s3://.
        resolved: a model's name to its exact version and, for a block, its local folder.
        model: instead of the one that the recipe names.
        content: sources, one of which holds the content's bytes.
        style: sources, one of which holds the style's bytes; not needed where the job's packs lie beside the output.
        scratch: folder for the picture and its maps; None is the system's for temporary files.

    Returns:
        the output, its recipe, whether the bytes and the pixels are the same, and by how many of 255 levels these are
        apart, at most and on average; `status` is `failed` where the bytes are not the same, or where it was made on
        another kind of device, which rounds otherwise, and a level and more lies between them on average.

    Raises:
        UsageError: it carries no recipe, or what the recipe names cannot be found.
    """
    uri = storage.absolute(uri)
    if not storage.exists(uri):
        raise UsageError(f"--replay {uri}: expected an output of pipelines/stylize.py, found nothing there")
    original = storage.read_bytes(uri)
    recipe = read_recipe(original, name=uri)
    if recipe is None:
        raise UsageError(f"--replay {uri}: expected an output of pipelines/stylize.py, found a picture without recipe")
    device = "cuda" if recipe.made.get("device") == "cuda" and torch.cuda.is_available() else "cpu"
    torch.set_num_threads(recipe.made.get("threads") or torch.get_num_threads())
    options = Options(**recipe.options)
    if not model and not checkpoint.is_mlflow_uri(recipe.model):
        raise UsageError(f"--replay {uri}: it was made by a checkpoint {recipe.model}; say where that is as --model")
    with scratch_folder("replay", scratch) as aside:
        with resolved(model or recipe.model) as (_, folder):
            # Whole frames and tiles are as the recipe says, whatever memory the job had.
            stylizer = Stylizer.from_folder(
                folder,
                device=device,
                precision=options.precision,
                max_memory_gb=math.inf,
                scratch=aside,
            )
        if stylizer.info.digest != recipe.model_digest:
            raise UsageError(
                f"--replay {uri}: expected model {recipe.model_digest[:12]}, found {stylizer.info.digest[:12]} at "
                f"{model or recipe.model}; give the right one as --model"
            )
        (aside / "content").mkdir()
        path = _find(content, recipe.content, recipe.content_sha256, aside / "content", "--content")
        pack = _pack(uri, recipe, options, style, stylizer, aside / "style")
        # On a GPU as many at once as there were then: all of them this one.
        batch = int(recipe.made.get("batch", 1)) if device == "cuda" else 1
        limits = Limits(batch_size=batch, tile=recipe.made.get("tile"), max_megapixels=1e6, scratch=aside)
        root = aside / "made"
        wanted = [Wanted(number, recipe, lambda: pack) for number in range(batch)]
        for made in Production(lambda: stylizer, str(root), limits).make(path, wanted):
            if made.state != "done":
                raise UsageError(f"--replay {uri}: {made.reason}")
        again = (root / recipe.name).read_bytes()
    return _compared(uri, recipe, original, again)


def _compared(uri: str, recipe: Recipe, original: bytes, again: bytes) -> dict[str, Any]:
    most, mean = (0, 0.0) if again == original else _levels_apart(original, again)
    result: dict[str, Any] = {
        "replayed": uri,
        "same_bytes": again == original,
        "same_pixels": most == 0,
        "levels_apart": {"most": most, "mean": round(mean, 4)},
        "recipe": recipe.__dict__,
    }
    if again == original:
        return result
    here = (read_recipe(again) or recipe).made
    told = "of the same pixels" if most == 0 else f"of pixels up to {most} of 255 levels apart, {mean:.2g} on average"
    told = (
        f"{uri}: made again, it has other bytes ({len(again)} instead of {len(original)}), {told}; the recipe was made "
        f"by {recipe.made}, here it is {here}"
    )
    if mean < 1 and any(here.get(name) != recipe.made.get(name) for name in ("device", "gpu")):
        log.warning("%s. Another kind of device rounds otherwise", told)
        return result
    return result | {"status": "failed", "error": told}


def _levels_apart(one: bytes, other: bytes) -> tuple[int, float]:
    """At most and on average, of two files' pixels; all 255 where they are not of one size, or none can be read."""
    with contextlib.suppress(ImageError):
        first, second = (decode(data, max_pixels=None, keep_colours=True) for data in (one, other))
        if first.size == second.size:
            apart = ImageStat.Stat(ImageChops.difference(first, second))
            return max(int(most) for _, most in apart.extrema), sum(apart.mean) / len(apart.mean)
    return 255, 255.0


def _pack(
    uri: str, recipe: Recipe, options: Options, style: Sequence[str], stylizer: Stylizer, scratch: Path
) -> StylePack:
    """From the job's own packs, or from the style's image or pack."""
    root = uri.removesuffix(recipe.name).rstrip("/")
    beside = storage.join(root, pack_name(recipe.style, recipe.pack_digest))
    digest = stylizer.info.digest
    if storage.exists(beside):
        return StylePack.from_bytes(storage.read_bytes(beside), name=beside, model_digest=digest)
    if not style:
        raise UsageError(f"--replay {uri}: found no style pack at {beside}; name where {recipe.style} lies as --style")

    def pack_of(item: Item) -> StylePack:
        if item.kind == "pack":
            return StylePack.from_bytes(read_item(item), name=item.source, model_digest=digest)
        if item.kind == "mixture":
            return mixture_of(item, pack_of)
        path = local_file(item, scratch)
        picture, sha256 = decode_picture(path, max_pixels=None), sha256_of(path)
        return stylizer.style_pack(picture, side=options.style_side, source=item.source, source_sha256=sha256)

    scratch.mkdir()
    items, trouble = list_items(style, flag="--style", packs=True), ""
    for item in (item for item in items if item.kind == "pack" or item.source == recipe.style):
        try:
            pack = pack_of(item)
        except ImageError as error:  # what cannot be had is not it
            trouble = f"; {item.source}: {error}"
            continue
        if pack.digest == recipe.pack_digest:
            return pack
    if "+" in recipe.style_sha256:
        raise UsageError(
            f"--replay {uri}: {recipe.style} is a mixture; expected its table as --style, with the rows that it had "
            f"then, found none such{trouble}"
        )
    path = _find(style, recipe.style, recipe.style_sha256, scratch, "--style")
    picture = decode_picture(path, max_pixels=None)
    pack = stylizer.style_pack(picture, side=options.style_side, source=recipe.style, source_sha256=recipe.style_sha256)
    if pack.digest != recipe.pack_digest:
        raise UsageError(
            f"--replay {uri}: {recipe.style} was a style pack, and not of this image alone; name it as --style"
        )
    return pack


def _find(sources: Sequence[str], name: str, sha256: str, scratch: Path, flag: str) -> Path:
    """The file with these bytes, wherever it lies now; one of the same name is looked at first."""
    found = list_items(sources, flag=flag, packs=flag == "--style")  # as the job does
    items: list[Item] = [item for item in found if item.kind not in ("pack", "mixture")]
    items.sort(key=lambda item: reading_order(item.to_row()))
    for item in sorted(items, key=lambda item: (item.source != name, not item.source.endswith(Path(name).name))):
        with contextlib.suppress(ImageError):  # what cannot be had is not it
            path = local_file(item, scratch)
            if sha256_of(path) == sha256:
                return path
    raise UsageError(f"{flag} {', '.join(sources)}: expected {name} with sha256 {sha256[:16]}…, found no such bytes")
