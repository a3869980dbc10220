"""Configuration of pipelines/trace.py: some images, and where to look for what was made of them."""

from pydantic import Field, model_validator

from adaconv.config.base import Config, Location, Name, TrackingUri


class TraceConfig(Config):
    dataset: tuple[Location, ...] = Field(min_length=1)
    """Roots of datasets, folders or s3://: all their versions are looked at."""
    key: tuple[Name, ...] = ()
    """Images by key, or by the sha256 of their source."""
    label: tuple[Name, ...] = ()
    """Images by label, those of folders below it as well."""
    artist: tuple[Name, ...] = ()
    """Images by artist."""
    source_pattern: tuple[Name, ...] = ()
    """Images by source, with * and ? as in a shell: `Impressionism/claude-monet_*`."""
    tracking_uri: TrackingUri = None
    """MLflow tracking server or database of the runs; None: MLFLOW_TRACKING_URI, else mlflow.db in the current
    folder."""
    stylized: tuple[Location, ...] = ()
    """Output folders of stylization jobs."""
    output: Location | None = None
    """Folder for result.json and outputs.txt, which names every output; None writes none."""

    @model_validator(mode="after")
    def _names_something(self) -> "TraceConfig":
        if not (self.key or self.label or self.artist or self.source_pattern):
            raise ValueError("name what to look for: --key, --label, --artist or --source-pattern")
        return self
