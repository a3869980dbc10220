"""What several tests make."""

from pathlib import Path

import pyarrow as pa
import torch

from adaconv import checkpoint
from adaconv.config.shard import RecipeConfig
from adaconv.data.ingest import key_of
from adaconv.data.manifest import MANIFEST, DatasetVersion, publish_version
from adaconv.data.plan import Candidate, plan_shards
from adaconv.data.shard_writer import row_of, write_shard
from adaconv.data.sources import list_images
from adaconv.images import open_header
from adaconv.model.encoder_weights import fingerprint, load_encoder
from adaconv.model.network import StyleTransferNet, build_network

RECIPE = RecipeConfig(target_mb=0.05, short_side=96, min_side=32)


TINY_MODEL = {"architecture": "adaconv", "descriptor_channels": 8, "groups": [16, 4, 2, 1]}
TINY_WIDTHS = (4, 8, 8, 16)


def save_checkpoint(folder: Path, step: int = 7) -> tuple[StyleTransferNet, str]:
    """A fresh network, seeded by the step, and its checkpoint."""
    torch.manual_seed(step)
    encoder = load_encoder("seeded:0", widths=TINY_WIDTHS)
    network = build_network(encoder=encoder, **TINY_MODEL)
    uri = checkpoint.save(
        str(folder),
        step=step,
        network=network,
        settings={"model": TINY_MODEL, "encoder_widths": list(TINY_WIDTHS)},
        encoder_fingerprint=fingerprint(encoder),
        trainer={"step": step, "moments": torch.ones(3)},
        data={"seed": 1},
        meta={"run_id": "r"},
    )
    return network, uri


def build_version(folder: Path, root: str, recipe: RecipeConfig = RECIPE) -> DatasetVersion:
    """A dataset version in this process, through the parts that the job runs on Ray."""
    candidates = []
    for found in list_images((str(folder),)):
        data = Path(found.uri).read_bytes()
        width, height = open_header(data).size
        key = key_of(data)
        candidates.append(Candidate(key, found.uri, found.source, found.label, key * 2, len(data), width, height))
    plans, duplicates = plan_shards(candidates, recipe)
    rows = [row_of(left, "duplicate", "of") for left, _ in duplicates]
    shards = []
    for plan in plans:
        shard, of_shard = write_shard(plan, recipe, root)
        rows += of_shard
        if shard:
            shards.append(shard)
    table = pa.Table.from_pylist(rows, schema=MANIFEST)
    return publish_version(root, recipe=recipe.model_dump(mode="json"), shards=shards, rows=table)
