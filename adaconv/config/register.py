"""Configuration of pipelines/register.py: a checkpoint to a named model version, and aliases from one to another."""

from pydantic import Field, model_validator

from adaconv.config.base import Alias, Config, Location, ModelName, ModelTrackingConfig


class RegisterConfig(Config):
    model: Location | None = None
    """Checkpoint folder (local or s3://); a folder of runs or of one run, whose newest checkpoint is taken; or a
    version that is there, models:/NAME@ALIAS or models:/NAME/VERSION, that an alias is moved to."""
    name: ModelName = "adaconv"
    """Registered model that the version belongs to."""
    alias: Alias = "candidate"
    """Alias that is moved to the version; `champion` is the one that jobs use."""
    rollback: Alias = None
    """Instead of --model: an alias that is moved back to the version that it named before."""
    reason: str = Field(default="", max_length=1000)
    """Why the alias moves; kept with the version and in the alias's history."""
    output: Location | None = None
    """Folder for result.json; None writes none."""
    tracking: ModelTrackingConfig = ModelTrackingConfig()

    @model_validator(mode="after")
    def _says_which_version(self) -> "RegisterConfig":
        if (self.model is None) == (self.rollback is None):
            raise ValueError("give either --model, or --rollback with the alias to move back")
        return self
