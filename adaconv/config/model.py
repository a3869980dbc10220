"""What the network is: its encoder, its layers and its losses. See docs/design for what the paper leaves open."""

from typing import Literal

from pydantic import Field

from adaconv.config.base import Config


class EncoderConfig(Config):
    weights: str = "imagenet"
    """VGG-19 weights: `imagenet` (torchvision's, downloaded once), a file or URL, or `seeded:<n>` (offline runs and
    tests; not for quality)."""
    normalise: Literal["data", "none"] = "data"
    """`data` rescales channels to a mean activation of 1 over a calibration sample of the datasets
    (function-preserving); `none` keeps the weights as they are."""
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    """Channels at relu1_1, relu2_1, relu3_1 and relu4_1."""


class ModelConfig(Config):
    architecture: Literal["adaconv", "adain"] = "adaconv"
    """`adaconv`: kernels predicted from the style; `adain`: the baseline that transfers means and deviations."""
    descriptor_channels: int = Field(default=512, ge=1)
    """Channels of the style descriptor W."""
    groups: tuple[int, int, int, int] = (512, 128, 32, 8)
    """Groups of the adaptive convolutions from the coarsest scale to the finest; each divides its scale's channels."""


class LossConfig(Config):
    content_weight: float = Field(default=1.0, ge=0)
    """Weight of the content loss at relu4_1."""
    style_weight: float = Field(default=10.0, ge=0)
    """Weight of the style loss, summed over relu1_1 ... relu4_1."""
    identity_weight: float = Field(default=0.0, ge=0)
    """Weight of the difference between an image and itself stylized with itself, at even steps of contents and at odd
    steps of styles; 0, as in the paper, leaves it out and spares a third of a step."""
    tv_weight: float = Field(default=0.0, ge=0)
    """Weight of the total variation of the output, against noise; 0, as in the paper, leaves it out."""
