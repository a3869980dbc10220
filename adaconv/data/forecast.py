"""What a listing will come to, before anything is written, and how many nodes of a training its shards serve."""

import heapq
import math
from dataclasses import dataclass

from adaconv.config.shard import RecipeConfig
from adaconv.data.builds import Listing
from adaconv.data.ingest import Header, look
from adaconv.data.plan import Candidate, expected_bytes
from adaconv.data.shard_writer import read_ahead
from adaconv.data.subset import rank_of

_LOOKED_AT = 64  # images: their mean is within a tenth or so of all images'
_TO_BE_SURE = 0.8


@dataclass(frozen=True)
class Forecast:
    """About how many shards there will be, and their bytes, by the headers of `looked_at` images."""

    shards: int
    bytes: float
    looked_at: int


def forecast(listing: Listing, recipe: RecipeConfig) -> Forecast:
    """Look at a few images, the same ones every time: the sizes of files tell little of what is scaled down."""
    some = heapq.nsmallest(_LOOKED_AT, listing.files(), key=lambda found: rank_of(found.source, 0))
    sizes = []
    for found, data in zip(some, read_ahead(some, max_bytes=int(recipe.max_megabytes * 1e6)), strict=True):
        header = look(data, recipe) if isinstance(data, bytes) else None
        if isinstance(header, Header):
            candidate = Candidate("", "", "", found, header.width, header.height)
            sizes.append(expected_bytes(candidate, recipe))
    if not sizes:
        return Forecast(0, 0, len(some))
    mean, images = sum(sizes) / len(sizes), listing.images * len(sizes) / len(some)
    each = max(1.0, recipe.target_mb * 1e6 / mean - 0.5)  # a shard ends before the image that would be too much
    return Forecast(math.ceil(images / each), images * mean, len(some))


def serves(shards: int) -> str:
    return f"{shards} shards serve up to {shards} nodes of a training from an object store, any number from a disk"


def shortage(shards: int, stored_bytes: float, *, nodes: int | None) -> str | None:
    """Why so many shards are too few for so many nodes, and what to do; None if they are enough."""
    if nodes is None or shards >= nodes:
        return None
    target = stored_bytes / 1e6 / nodes * _TO_BE_SURE
    return (
        f"{shards} shards are too few for {nodes} nodes: pipelines/train.py refuses a dataset on an object store that "
        f"has fewer shards than nodes. --shard.target-mb {float(f'{target:.2g}'):g} makes enough of as many images"
    )
