"""What several tests make."""

import contextlib
import struct
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import ImageCms

from adaconv import checkpoint
from adaconv.config.shard import RecipeConfig
from adaconv.data.ingest import Header, ingest, look, recipe_of
from adaconv.data.manifest import IN_SHARDS, DatasetVersion, latest_version, publish_version
from adaconv.data.plan import Candidate, plan_shards
from adaconv.data.shard_writer import write_shard
from adaconv.data.sources import Found, iter_images, read_found
from adaconv.model.encoder_weights import fingerprint, load_encoder
from adaconv.model.network import StyleTransferNet, build_network

RECIPE = RecipeConfig(target_mb=0.05, short_side=96, min_side=32)


TINY_MODEL = {"architecture": "adaconv", "descriptor_channels": 8, "groups": [16, 4, 2, 1]}
TINY_WIDTHS = (4, 8, 8, 16)
# The same as flags of pipelines/train.py, on small crops that are decoded where they are trained on.
TINY_TRAINING = {
    "encoder.widths": "4 8 8 16",
    "model.descriptor-channels": 8,
    "model.groups": "16 4 2 1",
    "data.resize": 40,
    "data.crop": 32,
    "data.loader-workers": 0,
    "train.log-every-steps": 1,
    "tracking.sample-contents": 1,
    "tracking.sample-styles": 1,
}


def save_checkpoint(folder: Path, step: int = 7, **meta: Any) -> tuple[StyleTransferNet, str]:
    """A fresh network, seeded by the step, and its checkpoint."""
    torch.manual_seed(step)
    encoder = load_encoder("seeded:0", widths=TINY_WIDTHS)
    network = build_network(encoder=encoder, **TINY_MODEL)
    uri = checkpoint.save(
        str(folder),
        step=step,
        weights=network.state_dict(),
        settings={"model": TINY_MODEL, "encoder_widths": list(TINY_WIDTHS)},
        encoder_fingerprint=fingerprint(encoder),
        trainer={"step": step, "moments": torch.ones(3)},
        data={"seed": 1},
        meta={"run_id": "r", **meta},
    )
    return network, uri


def build_version(folder: Path, root: str, recipe: RecipeConfig = RECIPE) -> DatasetVersion:
    """A dataset version in this process, through the parts that the job runs on Ray."""
    shards, in_shards, outside = [], [], []
    for plan in plan_shards(look_at(iter_images((str(folder),)), recipe), recipe, duplicate=lambda c: None):
        shard, rows = write_shard(plan, root, partial(ingest, recipe=recipe))
        in_shards += [row for row in rows if row["state"] in IN_SHARDS]
        outside += [row for row in rows if row["state"] not in IN_SHARDS]
        if shard:
            shards.append(shard)
    rows = [*in_shards, *outside]
    return publish_version(root, recipe=recipe_of(recipe), shards=shards, rows=rows, after=latest_version(root))


def child_of(version: DatasetVersion, keep: int) -> DatasetVersion:
    """A version of some of the shards of another, with it as parent."""
    shards = version.shards[:keep]
    rows = [r for r in version.rows() if r["shard"] in {shard.name for shard in shards}]
    return publish_version(
        version.root, recipe=version.recipe, shards=shards, rows=rows, after=version.version, parent=version
    )


def look_at(found: Iterable[Found], recipe: RecipeConfig = RECIPE) -> list[Candidate]:
    """Candidates of images whose headers are good, sorted as plans want them."""
    candidates = []
    for one in found:
        data = read_found(one)
        header = look(data, recipe)
        assert isinstance(header, Header)
        candidates.append(Candidate.of(one, data, width=header.width, height=header.height))
    return sorted(candidates, key=lambda candidate: (candidate.key, candidate.source))


def swapped_profile() -> bytes:
    """sRGB's profile with the primaries of red and blue exchanged."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    at = {bytes(data[132 + 12 * n : 136 + 12 * n]): 132 + 12 * n for n in range(int.from_bytes(data[128:132]))}
    red, blue = at[b"rXYZ"], at[b"bXYZ"]
    data[red + 4 : red + 12], data[blue + 4 : blue + 12] = data[blue + 4 : blue + 12], data[red + 4 : red + 12]
    return bytes(data).replace("sRGB".encode("utf-16-be"), "xxxx".encode("utf-16-be")).replace(b"sRGB", b"xxxx")


def grey_profile() -> bytes:
    """Of grey whose levels are light itself, where those of sRGB are about its square root."""
    white = struct.pack(">3i", 63190, 65536, 54061)
    tags = {b"wtpt": b"XYZ \0\0\0\0" + white, b"kTRC": b"curv\0\0\0\0" + struct.pack(">I4x", 0)}
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += struct.pack(">4sII", name, 128 + 4 + 12 * len(tags) + len(body), len(data))
        body += data
    head = struct.pack(
        ">I4xI4s4s4s12x4s28x12s48x", 128 + len(table + body), 0x02400000, b"mntr", b"GRAY", b"XYZ ", b"acsp", white
    )
    return head + table + body


def held_open(folder: Path) -> list[str]:
    """Files below a folder that this process has open, those that were removed included: they take room."""
    names = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            names.append(str(link.readlink()))
    return sorted(name for name in names if name.startswith(f"{folder}/"))
