"""Configuration of pipelines/export.py: a model to ONNX graphs."""

from pydantic import Field

from adaconv.config.base import Config, Location, ModelTrackingConfig


class ExportConfig(Config):
    model: Location
    """models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/NAME, or a checkpoint folder (local or s3://); of a run or a
    folder of runs the newest checkpoint."""
    output: Location
    """Folder or s3://bucket/prefix for style.onnx and apply.onnx; those that are there are replaced."""
    style_side: int = Field(default=256, ge=16)
    """Styles are squares of this side, in pixels; a network is trained with 256."""
    tracking: ModelTrackingConfig = ModelTrackingConfig()
