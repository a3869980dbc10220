"""Configuration of pipelines/register.py: a checkpoint to a named model version."""

from adaconv.config.base import Config


class RegisterTrackingConfig(Config):
    uri: str | None = None
    """MLflow tracking server or database; None: the run's own, else MLFLOW_TRACKING_URI."""


class RegisterConfig(Config):
    model: str
    """Checkpoint folder (local or s3://), or a folder of runs or of one run, whose newest checkpoint is taken."""
    name: str = "adaconv"
    """Registered model that gets a new version."""
    alias: str | None = "candidate"
    """Alias that is moved to the new version; `champion` is the one that jobs use."""
    reason: str = ""
    """Why the alias moves; kept with the version."""
    output: str | None = None
    """Folder for result.json; None writes none."""
    tracking: RegisterTrackingConfig = RegisterTrackingConfig()
