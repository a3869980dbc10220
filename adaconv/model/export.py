"""A network as two ONNX graphs: a style to its code, once; a content and a code to a stylized image, each time.

Needs the extra `export` (onnx, onnxscript).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaconv.model.network import StyleTransferNet

OPSET = 20


class _StyleGraph(nn.Module):
    def __init__(self, network: StyleTransferNet, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, style: Tensor) -> tuple[Tensor, ...]:
        code = self.network.encode_style(style)
        return tuple(code[name] for name in self.names)


class _ApplyGraph(nn.Module):
    def __init__(self, network: StyleTransferNet, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, content: Tensor, code: Sequence[Tensor]) -> Tensor:
        features = self.network.encoder.relu4_1(content)
        return self.network.transfer.decode(features, dict(zip(self.names, code, strict=True)))


def export_onnx(network: StyleTransferNet, folder: Path | str, *, style_side: int = 256) -> tuple[Path, Path]:
    """Write `style.onnx` and `apply.onnx`, float32, weights inside.

    `style.onnx`: `style` (1, 3, style_side, style_side) in [0, 1] to the tensors of a style code, named as in
    `StyleTransferNet.encode_style`. `apply.onnx`: `content` (1, 3, H, W) in [0, 1], H and W any multiples of 8 from 32
    on, and those tensors, to `stylized` (1, 3, H, W), not clamped.

    Args:
        network: in eval mode, on the CPU.
        folder: made if it is not there.
        style_side: side of styles in pixels; a network is trained with 256.

    Returns:
        the two files.

    Raises:
        ImportError: onnx or onnxscript is not installed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    style = torch.zeros(1, 3, style_side, style_side)
    with torch.no_grad():
        code = network.encode_style(style)
    names = [name for name in code if name != "descriptor"]  # which the decoder does not read
    options: dict[str, Any] = {"dynamo": True, "opset_version": OPSET, "external_data": False, "verbose": False}
    of_style, of_content = folder / "style.onnx", folder / "apply.onnx"
    torch.onnx.export(
        _StyleGraph(network, names).eval(), (style,), of_style, input_names=["style"], output_names=names, **options
    )
    eighth_high, eighth_wide = torch.export.Dim("eighth_high", min=4), torch.export.Dim("eighth_wide", min=4)
    torch.onnx.export(
        _ApplyGraph(network, names).eval(),
        (torch.zeros(1, 3, 96, 64), [code[name] for name in names]),
        of_content,
        input_names=["content", *names],
        output_names=["stylized"],
        dynamic_shapes={"content": {2: 8 * eighth_high, 3: 8 * eighth_wide}, "code": [None] * len(names)},
        **options,
    )
    return of_style, of_content
