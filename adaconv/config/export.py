"""Configuration of pipelines/export.py: a model to ONNX graphs."""

from pydantic import Field, model_validator

from adaconv.config.base import Config, Location, PathOrWord, TrackingUri


class ExportTrackingConfig(Config):
    uri: TrackingUri = None
    """MLflow tracking server or database that models:/ and runs:/ are looked up in; None: MLFLOW_TRACKING_URI, else
    mlflow.db in the current folder."""


class ExportConfig(Config):
    model: PathOrWord = ""
    """models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/NAME, or a checkpoint folder (local or s3://); of a run or a
    folder of runs the newest checkpoint."""
    output: Location | None = None
    """Folder or s3://bucket/prefix for style.onnx and apply.onnx; those that are there are replaced."""
    style_side: int = Field(default=256, ge=16)
    """Styles are squares of this side, in pixels; a network is trained with 256."""
    tracking: ExportTrackingConfig = ExportTrackingConfig()

    @model_validator(mode="after")
    def _complete(self) -> "ExportConfig":
        missing = [f"--{name}" for name in ("model", "output") if not getattr(self, name)]
        if missing:
            raise ValueError(f"required: {', '.join(missing)}; give them as flags or in a --config file")
        return self
