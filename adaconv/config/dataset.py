"""Configuration of pipelines/dataset.py: what is done with a dataset version that is there, a model each."""

from pydantic import Field, model_validator

from adaconv.config.base import Config, Location, Name, TrackingUri
from adaconv.config.shard import BudgetConfig, ShardScalingConfig


class AppendConfig(Config):
    dataset: Location
    """Dataset to add to: ROOT or ROOT@VERSION, a folder or s3://. Its recipe is used; its shards stay as they are."""
    source: tuple[Location, ...] = Field(min_length=1)
    """Folders or zip archives of images; what the dataset has found before is not found again."""
    exclude: Location | None = None
    """File that lists what is to get into no shard, as pipelines/shard.py takes it. It is not remembered: where the
    dataset was made with one, it has to be given again, or a later one, or an empty file."""
    budget: BudgetConfig = BudgetConfig()
    scaling: ShardScalingConfig = ShardScalingConfig()


class RemoveConfig(Config):
    dataset: Location
    """Dataset to remove from: ROOT or ROOT@VERSION, a folder or s3://."""
    key: tuple[Name, ...] = ()
    """Samples by key, or by the sha256 of their source."""
    label: tuple[Name, ...] = ()
    """Samples by label, those of folders below it as well."""
    artist: tuple[Name, ...] = ()
    """Samples by artist."""
    source_pattern: tuple[Name, ...] = ()
    """Samples by source, with * and ? as in a shell: `Impressionism/claude-monet_*`."""
    exclude: Location | None = None
    """Samples by a list, as pipelines/shard.py takes it: it may name what is not there."""
    why: str = ""
    """Kept in the manifest with each of them."""
    scaling: ShardScalingConfig = ShardScalingConfig()

    @model_validator(mode="after")
    def _names_something(self) -> "RemoveConfig":
        if not (self.key or self.label or self.artist or self.source_pattern or self.exclude):
            raise ValueError("name what to remove: --key, --label, --artist, --source-pattern or --exclude")
        return self


class DiffConfig(Config):
    dataset: Location
    """Dataset version: ROOT or ROOT@VERSION, a folder or s3://."""
    against: Location
    """The version it is compared with: ROOT or ROOT@VERSION."""
    output: Location | None = None
    """Folder for result.json; None writes none."""


class VerifyConfig(Config):
    dataset: Location
    """Dataset version: ROOT or ROOT@VERSION, a folder or s3://."""
    output: Location | None = None
    """Folder for result.json; None writes none."""
    scaling: ShardScalingConfig = ShardScalingConfig()


class VersionsConfig(Config):
    dataset: Location
    """Root of a dataset, a folder or s3://."""
    output: Location | None = None
    """Folder for result.json; None writes none."""


class RollbackConfig(Config):
    dataset: Location
    """Root of a dataset, a folder or s3://."""
    to: str = Field(pattern="^[0-9a-f]+$")
    """Version that LATEST is to name, as `dataset.py versions` lists them: all of it must be there."""


class GcConfig(Config):
    dataset: Location
    """Root of a dataset, a folder or s3://."""
    keep_last: int | None = Field(default=None, ge=1)
    """Versions to keep: LATEST's and so many less one of its ancestors; all others go. None keeps every version."""
    older_than_hours: float = Field(default=24.0, ge=0)
    """Files that belong to no version go only if they are older: younger ones may belong to a running job."""
    tracking_uri: TrackingUri = None
    """MLflow tracking server or database: a version that one of its running trainings reads is not deleted. None:
    MLFLOW_TRACKING_URI; where that is not set either, nobody is asked."""
    output: Location | None = None
    """Folder for result.json; None writes none."""


class SimilarConfig(Config):
    dataset: Location
    """Dataset version: ROOT or ROOT@VERSION, a folder or s3://."""
    against: Location | None = None
    """Another one, such as that of evaluation: only images that both hold are reported, and they end the job with 1."""
    distance: int = Field(default=4, ge=0, le=7)
    """Bits of the 64 of two perceptual hashes that may differ: 0 finds copies, 4 those scaled or encoded anew."""
    output: Location | None = None
    """Folder for result.json; None writes none."""


class ReportConfig(Config):
    dataset: Location
    """Dataset version: ROOT or ROOT@VERSION, a folder or s3://."""
    output: Location
    """Folder for report.html, which needs no other file."""
    distance: int = Field(default=4, ge=0, le=7)
    """Bits in which the perceptual hashes of near-duplicates may differ."""
    sheet: int = Field(default=60, ge=0)
    """Images of the contact sheet, evenly over the version."""
