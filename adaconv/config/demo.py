"""Configuration of pipelines/demo.py: the whole way, small."""

from pydantic import Field

from adaconv.config.base import Config, LocalFolder, Location


class DemoConfig(Config):
    content: Location | None = None
    """Folder of photographs; None draws some."""
    style: Location | None = None
    """Folder of paintings; None draws some."""
    output: LocalFolder = "demo-output"
    """Folder for everything that the demo makes; run again, it takes up what is there."""
    images: int = Field(default=240, ge=8)
    """Photographs and paintings to draw where no folder is given."""
    steps: int = Field(default=1000, ge=1)
    """Training steps."""
    num_workers: int = Field(default=2, ge=1)
    """Ray Train workers."""
    grid_contents: int = Field(default=8, ge=1)
    """Contents to stylize."""
    grid_styles: int = Field(default=6, ge=1)
    """Styles to stylize them with."""
