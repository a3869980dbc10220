"""Configuration of pipelines/stylize.py: a model and contents x styles to stylized images."""

import re
from typing import Literal

from pydantic import Field, model_validator

from adaconv.config.base import Config, LocalFolder, Location, PathOrWord, TrackingUri


class OptionsConfig(Config):
    """What determines an output's bytes, besides its content, its style and the model: each is part of its name.

    A file of pairs may have a column for any of them but `precision`.
    """

    content_side: int | None = Field(default=None, ge=16)
    """Contents are scaled down until their shorter side has this many pixels; None keeps their size."""
    style_side: int = Field(default=256, ge=16)
    """Styles are scaled until their shorter side has this many pixels: the scale at which brush strokes are read. Of
    those more than 8 times as long as wide the middle is read."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` is faster where the hardware has it, with three digits for feature maps; style packs stay float32."""
    alpha: float = Field(default=1.0, ge=0, le=1)
    """From 0, the content in its own style, to 1: between them the kernels are faded."""
    color: Literal["style", "luminance", "coral"] = "style"
    """Colours of the style; or the content's chroma (`luminance`); or its mean and covariance of colours (`coral`)."""
    format: Literal["png", "jpeg", "webp", "tiff"] = "png"
    """Of the outputs' files."""
    quality: int = Field(default=90, ge=1, le=100)
    """Of JPEG and WebP."""
    keep_metadata: bool = False
    """Keep EXIF and the colour profile of contents; otherwise colours become sRGB and nothing is kept."""


class TileConfig(Config):
    max_memory_gb: float = Field(default=4.0, gt=0)
    """Memory of an actor (with GPUs: of its GPU), in 10^9 bytes; pictures that would take more are made in tiles."""
    side: int | None = Field(default=None, ge=64, multiple_of=8)
    """Make every picture in tiles of this side, in pixels; None tiles only where memory asks for it."""
    max_megapixels: float = Field(default=80.0, gt=0)
    """Larger contents and styles are refused by their header."""
    scratch: LocalFolder | None = None
    """Local folder for the maps of tiled pictures, 102 bytes a pixel (114 with `coral`), and rows of the index; None is
    the system's for temporary files."""


class ActorConfig(Config):
    num_actors: int | None = Field(default=1, ge=1)
    """Copies of the model that work side by side; None takes as many as CPUs or GPUs, and memory, allow."""
    gpus_per_actor: float = Field(default=0, ge=0)
    """GPUs of each; 0 stylizes on CPUs."""
    cpus_per_actor: float = Field(default=1, gt=0)
    """CPUs that Ray reserves for each; as many threads encode and publish its outputs beside the network."""
    threads_per_actor: int | None = Field(default=None, ge=1)
    """Threads that torch uses in each; None divides the machine's cores among them when on CPUs."""
    batch_size: int = Field(default=1, ge=1)
    """Styles that a content is decoded with at once on a GPU; on CPUs it is one. Halved where memory runs out."""


class GalleryConfig(Config):
    max_contents: int = Field(default=500, ge=1)
    """Contents (rows) that the gallery shows; the index always has all."""
    max_styles: int = Field(default=100, ge=1)
    """Styles (columns) that the gallery shows."""
    max_outputs: int = Field(default=10_000, ge=1)
    """Outputs that the gallery shows; about 5 kB of the page each."""
    thumbnail_side: int = Field(default=160, ge=16)
    """Longer side of a picture in the gallery, in pixels; a click opens the full size."""


class FailureBudgetConfig(Config):
    share: float = Field(default=0.0, ge=0, le=1)
    """Share of the pairs that may fail before the job ends with 1; the index names them all the same."""


class StylizeTrackingConfig(Config):
    uri: TrackingUri = None
    """MLflow tracking server or database that models:/ and runs:/ are looked up in; None: MLFLOW_TRACKING_URI, else
    mlflow.db in the current folder."""


class StylizeConfig(Config):
    model: PathOrWord = ""
    """models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/NAME, or the folder (local or s3://) of a checkpoint, or of a
    run or runs, whose newest one it is."""
    content: tuple[Location, ...] = ()
    """Contents: images, folders or zips of them, dataset versions (ROOT or ROOT@VERSION), FILE.parquet#COLUMN."""
    style: tuple[Location, ...] = ()
    """Styles: the same, or style packs (FILE.safetensors, or folders of them), or mixtures: FILE.csv with columns
    `name`, `style` and `weight`, a row for each part of each."""
    output: Location | None = None
    """Folder or s3://bucket/prefix for images, style packs, index and gallery, in no folder of contents or styles; run
    again, it makes what is missing."""
    pairs: PathOrWord = "grid"
    """`grid`: all with all; `zip`: one to one; `random:K`: K styles for each content, by the seed; or a .csv or
    .parquet file with columns `content`, `style` and any of the options but `precision`."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of `random:K`."""
    replay: Location | None = None
    """An output: make it again from its recipe and compare the bytes, or the pixels on another kind of device. Needs
    --content, and --style unless the pack is where the job left it; --model where the recipe's name of it cannot be
    resolved."""
    limit_contents: int | None = Field(default=None, ge=1)
    """Take this many contents, evenly spread over the sorted list; None takes all."""
    limit_styles: int | None = Field(default=None, ge=1)
    """Take this many styles, evenly spread over the sorted list; None takes all."""
    options: OptionsConfig = OptionsConfig()
    tile: TileConfig = TileConfig()
    scaling: ActorConfig = ActorConfig()
    gallery: GalleryConfig = GalleryConfig()
    budget: FailureBudgetConfig = FailureBudgetConfig()
    tracking: StylizeTrackingConfig = StylizeTrackingConfig()

    @model_validator(mode="after")
    def _complete(self) -> "StylizeConfig":
        required = ("content",) if self.replay else ("model", "content", "style", "output")
        missing = [f"--{name}" for name in required if not getattr(self, name)]
        if missing:
            raise ValueError(f"required: {', '.join(missing)}; give them as flags or in a --config file")
        if not re.fullmatch(r"grid|zip|random:[1-9]\d*|.+\.(csv|parquet)", self.pairs):
            raise ValueError(f"pairs: expected grid, zip, random:K, or a .csv or .parquet file; found {self.pairs}")
        return self
