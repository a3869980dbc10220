"""Configuration of pipelines/stylize.py: a model and contents x styles to stylized images."""

from typing import Literal

from pydantic import Field

from adaconv.config.base import Config


class OptionsConfig(Config):
    """What determines an output's bytes, besides its content, its style and the model: each is part of its name."""

    content_side: int | None = Field(default=None, ge=16)
    """Contents are scaled down until their shorter side has this many pixels; None keeps their size."""
    style_side: int = Field(default=256, ge=16)
    """Styles are scaled until their shorter side has this many pixels: the scale at which brush strokes are read."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` is faster where the hardware has it, with three digits for feature maps; style packs stay float32."""


class ActorConfig(Config):
    num_actors: int = Field(default=1, ge=1)
    """Copies of the model that work side by side."""
    gpus_per_actor: float = Field(default=0, ge=0)
    """GPUs of each; 0 stylizes on CPUs."""
    cpus_per_actor: float = Field(default=1, gt=0)
    """CPUs that Ray reserves for each."""
    threads_per_actor: int | None = Field(default=None, ge=1)
    """Threads that torch uses in each; None divides the machine's cores among them when on CPUs."""


class GalleryConfig(Config):
    max_contents: int = Field(default=50, ge=1)
    """Contents (rows) that the gallery shows; the index always has all."""
    max_styles: int = Field(default=20, ge=1)
    """Styles (columns) that the gallery shows."""
    thumbnail_side: int = Field(default=192, ge=16)
    """Longer side of a picture in the gallery, in pixels; a click opens the full size."""


class StylizeTrackingConfig(Config):
    uri: str | None = None
    """MLflow tracking server or database that models:/ and runs:/ are looked up in; None: MLFLOW_TRACKING_URI."""


class StylizeConfig(Config):
    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/NAME, or a checkpoint folder (local or s3://)."""
    content: tuple[str, ...] = Field(min_length=1)
    """Folders of contents, with any folders below them."""
    style: tuple[str, ...] = Field(min_length=1)
    """Folders of styles, with any folders below them."""
    output: str
    """Folder or s3://bucket/prefix for images, style packs, index and gallery; run again, it makes what is missing."""
    limit_contents: int | None = Field(default=None, ge=1)
    """Take this many contents, evenly spread over the sorted list; None takes all."""
    limit_styles: int | None = Field(default=None, ge=1)
    """Take this many styles, evenly spread over the sorted list; None takes all."""
    options: OptionsConfig = OptionsConfig()
    scaling: ActorConfig = ActorConfig()
    gallery: GalleryConfig = GalleryConfig()
    tracking: StylizeTrackingConfig = StylizeTrackingConfig()
