"""Configuration of pipelines/submit.py: a pipeline as a job on a cluster."""

from pydantic import Field

from adaconv.config.base import Config, Location


class SubmitConfig(Config):
    address: str | None = None
    """The cluster's dashboard, http://host:8265; None: the variable RAY_API_SERVER_ADDRESS or RAY_ADDRESS."""
    working_dir: Location = "."
    """Folder that is sent; files that git ignores stay here."""
    stop_wait_seconds: int = Field(default=120, ge=0)
    """Time that a stopped job gets for its last checkpoint before it is killed."""
    wait: bool = True
    """Follow the job's log and take over its success or failure."""
