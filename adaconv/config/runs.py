"""Configuration of pipelines/runs.py: what is done with runs that have ended, a model each."""

from pydantic import Field

from adaconv.config.base import Config, LocalFolder, Location, Name, TrackingUri


class SyncConfig(Config):
    runs: LocalFolder
    """Folder of runs, or of one, on this machine: every spool below it is handed over."""
    tracking_uri: TrackingUri = None
    """MLflow tracking server or database; None: the one that each run was told to last. Another one gets all of the run
    that its spool has, which is all but the pictures that were handed over."""
    timeout_seconds: float = Field(default=300, gt=0)
    """Longest time for one run, in seconds."""
    output: Location | None = None
    """Folder for result.json; None writes none."""


class PageConfig(Config):
    run: Name
    """Name or id of a run."""
    against: Name | None = None
    """Name or id of a run to show beside it."""
    output: Location
    """Folder for time-machine.html, which needs no other file."""
    max_mb: float = Field(default=18, gt=0)
    """Bytes of the pictures of each run, in units of 1e6."""
    tracking_uri: TrackingUri = None
    """MLflow tracking server or database; None: MLFLOW_TRACKING_URI, else mlflow.db in the current folder."""


class ReapConfig(Config):
    tracking_uri: TrackingUri = None
    """MLflow tracking server or database; None: MLFLOW_TRACKING_URI, else mlflow.db in the current folder."""
    output: Location | None = None
    """Folder for result.json; None writes none."""
