"""What the network is: its encoder, its layers and its losses. See docs/design for what the paper leaves open."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from adaconv.config.base import Config, Weights

Count = Annotated[int, Field(ge=1)]


class EncoderConfig(Config):
    weights: Weights = "imagenet"
    """VGG-19 weights: `imagenet` (torchvision's, downloaded once), a file or URL, or `seeded:<n>` (offline runs and
    tests; not for quality)."""
    normalise: Literal["data", "none"] = "data"
    """`data` rescales channels to a mean activation of 1 over 64 contents and 64 styles, whatever the batch
    (function-preserving); `none` keeps the weights as they are."""
    widths: tuple[Count, Count, Count, Count] = (64, 128, 256, 512)
    """Channels at relu1_1, relu2_1, relu3_1 and relu4_1."""


class ModelConfig(Config):
    architecture: Literal["adaconv", "adain"] = "adaconv"
    """`adaconv`: kernels predicted from the style; `adain`: the baseline that transfers means and deviations."""
    descriptor_channels: int = Field(default=512, ge=1)
    """Channels of the style descriptor W."""
    descriptor_size: int = Field(default=3, ge=1)
    """Height and width of W: `kernel_size` with predictor_padding `same`, more with `valid`."""
    descriptor_norm: bool = True
    """Divide W by its root mean square; stylized images grow with the square of its scale."""
    style_block: Literal["conv_pool_act", "conv_act_pool"] = "conv_pool_act"
    """Order of convolution, pooling and leaky ReLU in the style encoder."""
    groups: tuple[Count, Count, Count, Count] = (512, 128, 32, 8)
    """Groups of the adaptive convolutions from the coarsest scale to the finest; each divides its scale's channels."""
    kernel_size: Literal[3, 5, 7] = 3
    """Height and width of the predicted depthwise kernels."""
    predictor_padding: Literal["same", "valid"] = "same"
    """How depthwise kernels are read off W: `same`, a padded 3x3 convolution over a W of their size; `valid`, one over
    a larger W that shrinks it to their size, as the paper's Fig. 3 draws it."""
    predictor_padding_mode: Literal["reflect", "zeros"] = "reflect"
    """Padding of `same`."""
    identity_base: bool = True
    """Add the predicted kernels to a learned identity, so that training starts from instance norm."""
    decoder_convs: tuple[Count, Count, Count, Count] = (1, 4, 2, 2)
    """Fixed convolutions of the decoder's scales, coarsest first; AdaIN's decoder has (1, 4, 2, 2)."""
    output_activation: Literal["none", "sigmoid"] = "none"
    """After the last convolution. `none` is linear and clamped when written."""

    @model_validator(mode="after")
    def _agree(self) -> "ModelConfig":
        size, kernel = self.descriptor_size, self.kernel_size
        if self.predictor_padding == "same" and size != kernel:
            raise ValueError(
                f"model.descriptor_size ({size}) must equal model.kernel_size ({kernel}) with model.predictor_padding "
                "same; a larger one goes with valid"
            )
        if size < kernel:
            raise ValueError(f"model.descriptor_size ({size}) must be at least model.kernel_size ({kernel})")
        return self


class LossConfig(Config):
    content_target: Literal["raw", "normalised"] = "raw"
    """Features at relu4_1 that the content loss compares: as they are, or instance-normalised, so that it does not
    punish the change of means and deviations that the style loss asks for."""
    content_weight: float = Field(default=1.0, ge=0)
    """Weight of the content loss at relu4_1."""
    style_weight: float = Field(default=10.0, ge=0)
    """Weight of the style loss, summed over relu1_1 ... relu4_1; where it is averaged, 4 times this is the same."""
    identity_weight: float = Field(default=0.0, ge=0)
    """Weight of the difference between an image and itself stylized with itself, at even steps of contents and at odd
    steps of styles; 0, as in the paper, leaves it out and spares a third of a step."""
    tv_weight: float = Field(default=0.0, ge=0)
    """Weight of the total variation of the output, against noise; 0, as in the paper, leaves it out."""

    @model_validator(mode="after")
    def _asks_for_something(self) -> "LossConfig":
        if not any((self.content_weight, self.style_weight, self.identity_weight, self.tv_weight)):
            raise ValueError("loss: expected one weight above 0, found all of them 0: nothing would be learned")
        return self
