"""Which networks rows are measured with, and how precisions are called in rows' names."""

from typing import Literal

from adaconv.model.encoder import VGGEncoder
from adaconv.model.network import StyleTransferNet, build_network
from adaconv.model.work import Size

Precision = Literal["float32", "bfloat16"]
SHORT: dict[Precision, str] = {"float32": "fp32", "bfloat16": "bf16"}


def size_of(architecture: Literal["adaconv", "adain"], *, quick: bool) -> Size:
    """The paper's, or one that shows that a row can be measured."""
    return Size(architecture, (8, 16, 32, 64), 16, 64) if quick else Size(architecture)


def network_of(size: Size) -> StyleTransferNet:
    """Ours, with fresh weights from torch's generator."""
    return build_network(
        encoder=VGGEncoder(widths=size.widths),
        architecture=size.architecture,
        descriptor_channels=size.descriptor_channels,
        groups=size.groups,
    )
