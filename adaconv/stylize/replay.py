"""An output made again from the recipe that it carries, and compared byte for byte."""

import contextlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from PIL import ImageChops

from adaconv import storage
from adaconv.errors import UsageError
from adaconv.images import ImageError, decode
from adaconv.scratch import scratch_folder
from adaconv.stylize.inputs import Item, decode_picture, list_items, local_file, sha256_of
from adaconv.stylize.outputs import Recipe, pack_name, read_recipe
from adaconv.stylize.production import Limits, Options, Production, Wanted
from adaconv.stylize.style_pack import StylePack
from adaconv.stylize.stylizer import Stylizer


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
        the output, its recipe, and whether the bytes and the pixels are the same; `status` is `failed` where the bytes
        are not.

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
    if recipe.made.get("device") == "cuda":
        raise UsageError(f"--replay {uri}: it was made on a GPU; CPUs round otherwise, and make other bytes")
    torch.set_num_threads(recipe.made.get("threads") or torch.get_num_threads())
    options = Options(**recipe.options)
    if not model and not recipe.model.startswith(("models:/", "runs:/")):
        raise UsageError(f"--replay {uri}: it was made by a checkpoint {recipe.model}; say where that is as --model")
    with scratch_folder("replay", scratch) as aside:
        with resolved(model or recipe.model) as (_, folder):
            # Whole frames and tiles are as the recipe says, whatever memory the job had.
            stylizer = Stylizer.from_folder(
                folder,
                precision=options.precision,  # type: ignore[arg-type]
                max_memory_gb=math.inf,
                scratch=aside,
            )
        if stylizer.info.digest != recipe.model_digest:
            raise UsageError(
                f"--replay {uri}: expected model {recipe.model_digest[:12]}, found {stylizer.info.digest[:12]} at "
                f"{model or recipe.model}; give the right one as --model"
            )
        path = _find(content, recipe.content, recipe.content_sha256, aside / "content", "--content")
        pack = _pack(uri, recipe, options, style, stylizer, aside / "style")
        limits = Limits(tile=recipe.made.get("tile"), max_megapixels=1e6, scratch=aside)
        root = aside / "made"
        (made,) = Production(lambda: stylizer, str(root), limits).make(path, [Wanted(0, recipe, lambda: pack)])
        if made.state != "done":
            raise UsageError(f"--replay {uri}: {made.reason}")
        again = (root / recipe.name).read_bytes()
    same_pixels = again == original or _same_pixels(again, original)
    result: dict[str, Any] = {"replayed": uri, "same_bytes": again == original, "same_pixels": same_pixels}
    result["recipe"] = recipe.__dict__
    if again != original:
        result |= {
            "status": "failed",
            "error": f"{uri}: made again, it has other bytes ({len(again)} instead of {len(original)}"
            f"{', of the same pixels' if same_pixels else ''}); the recipe was "
            f"made by {recipe.made}, here it is {read_recipe(again).made if read_recipe(again) else {}}",  # type: ignore[union-attr]
        }
    return result


def _same_pixels(one: bytes, other: bytes) -> bool:
    """As where another release of what packs them made files of other bytes."""
    with contextlib.suppress(ImageError):
        first, second = (decode(data, max_pixels=10**10) for data in (one, other))
        return first.size == second.size and ImageChops.difference(first, second).getbbox() is None
    return False


def _pack(
    uri: str, recipe: Recipe, options: Options, style: Sequence[str], stylizer: Stylizer, scratch: Path
) -> StylePack:
    """From the job's own packs, or from the style's image or pack."""
    root = uri.rpartition("/images/")[0]
    beside = storage.join(root, pack_name(recipe.style, recipe.pack_digest))
    digest = stylizer.info.digest
    if storage.exists(beside):
        return StylePack.from_bytes(storage.read_bytes(beside), name=beside, model_digest=digest)
    if not style:
        raise UsageError(f"--replay {uri}: found no style pack at {beside}; name where {recipe.style} lies as --style")
    for item in list_items(style, flag="--style", packs=True):
        if item.kind == "pack":
            pack = StylePack.from_bytes(storage.read_bytes(item.uri), name=item.source, model_digest=digest)
            if pack.digest == recipe.pack_digest:
                return pack
    path = _find(style, recipe.style, recipe.style_sha256, scratch, "--style")
    picture = decode_picture(path, max_pixels=10**10)
    return stylizer.style_pack(picture, side=options.style_side, source=recipe.style, source_sha256=recipe.style_sha256)


def _find(sources: Sequence[str], name: str, sha256: str, scratch: Path, flag: str) -> Path:
    """The file with these bytes, wherever it lies now; one of the same name is looked at first."""
    scratch.mkdir()
    items: list[Item] = [item for item in list_items(sources, flag=flag, packs=True) if item.kind != "pack"]
    for item in sorted(items, key=lambda item: (item.source != name, not item.source.endswith(Path(name).name))):
        with contextlib.suppress(ImageError):  # what cannot be had is not it
            path = local_file(item, scratch)
            if sha256_of(path) == sha256:
                return path
    raise UsageError(f"{flag} {', '.join(sources)}: expected {name} with sha256 {sha256[:16]}…, found no such bytes")
