"""Configuration of pipelines/evaluate.py: models, the pictures they are judged on, and who may become the champion."""

from typing import Literal

from pydantic import Field

from adaconv.config.base import Alias, Config, Location, ModelName, ModelTrackingConfig, Weights
from adaconv.config.model import Count

Margin = Field(default=0.05, ge=0)


class ProtocolConfig(Config):
    """The pictures. Scores can be compared where the protocol's id is the same."""

    contents: int = Field(default=20, ge=2)
    """Take this many contents, evenly spread over the sorted list."""
    styles: int = Field(default=40, ge=2)
    """Take this many styles, evenly spread over the sorted list."""
    side: int = Field(default=512, ge=64, multiple_of=8)
    """Pictures are squares of this side, in pixels: the middle of each, scaled."""
    style_side: int = Field(default=256, ge=16)
    """Models read styles at this side, in pixels."""


class JudgeConfig(Config):
    weights: Weights = "imagenet"
    """Of the VGG-19 that compares, the same for all models: `imagenet`, a file or URL, or `seeded:<n>` (not for
    quality)."""
    widths: tuple[Count, Count, Count, Count] = (64, 128, 256, 512)
    """Its channels at relu1_1, relu2_1, relu3_1 and relu4_1; only seeded ones may have others."""


class GateConfig(Config):
    """When --model takes the place. Changes are of a metric's mean, as a share of what it is now."""

    require: Literal["better", "not_worse"] = "better"
    """`better`: no metric may be worse, and one must be better, surely; `not_worse`: no metric may be worse."""
    content: float = Margin
    """Share by which `content` may be worse at the most, with a confidence of 95 %; 1000 allows anything."""
    structure: float = Margin
    """The same of `structure`."""
    style: float = Margin
    """The same of `style`."""
    gram: float = Margin
    """The same of `gram`."""
    colour: float = Margin
    """The same of `colour`."""
    identity: float = Margin
    """The same of `identity`."""


class EvaluateConfig(Config):
    model: Location
    """models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/NAME, or a checkpoint folder (local or s3://); of a run or a
    folder of runs the newest checkpoint."""
    against: tuple[Location, ...] = ()
    """Other models, named likewise, to show beside it; whoever has the alias of --promote is always there."""
    content: tuple[Location, ...] = Field(min_length=1)
    """Contents, not those of training: images, folders or zips of them, dataset versions (ROOT or ROOT@VERSION),
    FILE.parquet#COLUMN."""
    style: tuple[Location, ...] = Field(min_length=1)
    """Styles: the same."""
    output: Location
    """Folder or s3://bucket/prefix for report.html and scores.parquet; run again, it measures what is missing."""
    promote: Alias = None
    """Alias that --model gets, if it may: no defects, and compared with whoever has it as --gate.* says. Ends with 1
    if it may not."""
    name: ModelName = "adaconv"
    """Registered model that the alias belongs to; a --model models:/… says so itself."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU where there is one."""
    max_memory_gb: float = Field(default=4.0, gt=0)
    """Memory of this process (with a GPU: of that), in 10^9 bytes; pictures that would take more are made in tiles, and
    a protocol.style_side that would is refused."""
    protocol: ProtocolConfig = ProtocolConfig()
    judge: JudgeConfig = JudgeConfig()
    gate: GateConfig = GateConfig()
    tracking: ModelTrackingConfig = ModelTrackingConfig()
