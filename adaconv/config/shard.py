"""Configuration of pipelines/shard.py: raw images to a dataset version."""

from typing import Literal

from pydantic import Field

from adaconv.config.base import Config, Location

Layout = Literal["auto", "wikiart", "artist", "csv", "plain"]


class RecipeConfig(Config):
    """What determines a dataset's bytes, besides the images."""

    target_mb: float = Field(default=256.0, gt=0)
    """Size of a shard, in megabytes (10^6 bytes), aimed at."""
    short_side: int = Field(default=512, ge=16)
    """Larger images are scaled down until their shorter side has this many pixels; none is enlarged."""
    resample: Literal["linear", "cubic", "lanczos3"] = "cubic"
    """Kernel of libvips that images are scaled down by, from the softest to the sharpest; all take about as long."""
    min_side: int = Field(default=256, ge=1)
    """Images whose shorter side has fewer pixels are quarantined as `too_small`."""
    max_aspect: float = Field(default=8.0, ge=1)
    """Images longer than this many times their shorter side are quarantined as `too_thin`."""
    max_megapixels: float = Field(default=40.0, gt=0, le=178)
    """Images with more pixels (10^6) are quarantined undecoded as `too_many_pixels`."""
    max_megabytes: float = Field(default=320.0, gt=0)
    """Files with more bytes (10^6) are quarantined unread as `too_many_bytes`."""
    jpeg_quality: int = Field(default=95, ge=1, le=100)
    """Quality of images that are encoded anew (4:4:4); one that needs no change keeps its bytes."""

    layout: Layout = "auto"
    """Where artists and styles are read. `wikiart`: names `Style/artist_title.jpg`; `artist`: folders of artists;
    `csv`: all_data_info.csv or train_info.csv of Painter by Numbers, in the source or beside it; `plain`: nowhere;
    `auto`: csv if there is one, and wikiart in folders that are called like one of WikiArt's styles. The log says which
    was recognised."""


class SubsetConfig(Config):
    """Which of the images that are found are taken, where not all are to be: part of the build's identity.

    They are those of the lowest hashes of the seed and their path below the source: the same ones wherever that lies.
    """

    limit: int | None = Field(default=None, ge=1, lt=2**63)
    """Images to take, at most. With the same seed, a smaller number takes some of those that a larger one takes."""
    fraction: float | None = Field(default=None, gt=0, le=1)
    """Share of the images to take, about."""
    per_label: int | None = Field(default=None, ge=1, lt=2**63)
    """Images to take of each style where the layout tells styles, else of each folder, at most: as many of one with ten
    thousand as of one with a hundred."""
    seed: int = 0
    """Another one takes others."""


class BudgetConfig(Config):
    share: float = Field(default=0.01, ge=0, le=1)
    """Share of the images found that may be quarantined before the job refuses to publish."""
    at_least: int = Field(default=20, ge=0)
    """Quarantined images that are always allowed."""


class ShardScalingConfig(Config):
    num_workers: int | None = Field(default=None, ge=1)
    """Ray tasks at once, a CPU each; None takes every CPU of the cluster. The result does not depend on it."""


class ShardConfig(Config):
    source: tuple[Location, ...] = Field(min_length=1)
    """Folders or zip archives of images, here or on s3://, with any folders below them; the folder an image lies in is
    its label."""
    output: Location
    """Root of the dataset: a folder or s3://bucket/prefix."""
    shard: RecipeConfig = RecipeConfig()
    subset: SubsetConfig = SubsetConfig()
    exclude: Location | None = None
    """File that lists what is to get into no shard: lines `artist:NAME`, `label:NAME`, `sha256:HEX` or
    `source:PATTERN`."""
    for_nodes: int | None = Field(default=None, ge=1)
    """Nodes that a training from an object store is to have: a warning is given where fewer shards than that come out.
    The result does not depend on it."""
    budget: BudgetConfig = BudgetConfig()
    scaling: ShardScalingConfig = ShardScalingConfig()
