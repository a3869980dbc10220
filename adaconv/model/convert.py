"""Weights of other implementations to ours."""

from collections.abc import Mapping

from torch import Tensor

from adaconv.errors import WeightsError
from adaconv.model.encoder import VGGEncoder
from adaconv.model.network import StyleTransferNet, build_network

_DECODER_CONVS = (1, 4, 2, 2)


def _relbers_layers() -> dict[str, str]:
    """What RElbers/ada-conv-pytorch calls a layer -> what we call it."""
    positions = ("0.0", "1.0", "1.3", "2.0", "2.3", "3.0", "3.2", "3.4", "3.7")  # activations and poolings between
    names = {f"encoder.blocks.{position}": f"encoder.convs.{index}" for index, position in enumerate(positions)}
    # Each convolution of its style encoder is followed by an activation and a pooling.
    names |= {f"style_encoder.downscale.{3 * index}": f"transfer.style_encoder.convs.{index}" for index in range(3)}
    names["style_encoder.fc"] = "transfer.style_encoder.linear"
    # Its decoder is one list: at each scale a predictor, an adaptive block that holds the first fixed convolution, the
    # other convolutions, an activation after each, and an upsampling.
    layer = 0
    for scale, count in enumerate(_DECODER_CONVS):
        for theirs, ours in (("spatial", "depthwise"), ("pointwise.1", "pointwise"), ("bias.1", "bias")):
            names[f"decoder.layers.{layer}.{theirs}"] = f"transfer.predictors.{scale}.{ours}"
        for index in range(count):
            position = f"{layer + 1 + 2 * index}" if index else f"{layer + 1}.conv"
            names[f"decoder.layers.{position}"] = f"transfer.scales.{scale}.convs.{index}"
        layer += 1 + 2 * count + 1
    return names


def network_from_relbers(state: Mapping[str, Tensor]) -> StyleTransferNet:
    """Our network with the weights, and so the function, of one built as RElbers/ada-conv-pytorch builds it.

    Outputs agree up to float32's rounding for contents of whole multiples of 8 px and styles of the size it was trained
    for (256 px). Its style encoder pools after the activation, its descriptor is not normalised, and its predictors add
    nothing to what they predict: the network returned is built so, and in eval mode.

    Args:
        state: its state dict, or its trainer's, where every name begins with `model.`; read a checkpoint with
            `torch.load(path, weights_only=True)["state_dict"]`. Widths, groups and sizes are read off the shapes.

    Raises:
        WeightsError: a weight is missing, does not fit the others, or belongs to no layer of ours.
    """
    state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    theirs = {
        f"{their}.{part}": f"{our}.{part}" for their, our in _relbers_layers().items() for part in ("weight", "bias")
    }
    for word, names in (("no", theirs.keys() - state.keys()), ("unknown", state.keys() - theirs.keys())):
        if names:
            raise WeightsError(
                f"expected weights as RElbers/ada-conv-pytorch has them, found {word} {', '.join(sorted(names)[:5])}"
            )
    renamed = {ours: state[their] for their, ours in theirs.items()}
    one, two, three, four = (len(renamed[f"encoder.convs.{index}.bias"]) for index in (0, 2, 4, 8))
    predicted = [renamed[f"transfer.predictors.{scale}.depthwise.weight"] for scale in range(len(_DECODER_CONVS))]
    size = predicted[0].shape[-1]
    try:
        network = build_network(
            encoder=VGGEncoder(widths=(one, two, three, four)),
            descriptor_channels=predicted[0].shape[1],
            descriptor_size=size,
            kernel_size=size,
            groups=[max(1, width**2 // len(w)) for width, w in zip((four, three, two, one), predicted, strict=True)],
            decoder_convs=_DECODER_CONVS,
            style_block="conv_act_pool",
            descriptor_norm=False,
            identity_base=False,
        )
        buffers = {f"encoder.{name}": value for name, value in network.encoder.named_buffers()}
        network.load_state_dict({**renamed, **buffers})
    except (RuntimeError, ValueError) as error:
        worst = str(error).splitlines()[-1].strip()
        raise WeightsError(f"weights of RElbers/ada-conv-pytorch that do not fit one another: {worst}") from error
    return network.eval()
