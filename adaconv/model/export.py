"""A network as two ONNX graphs: styles to their codes, once; contents and codes to stylized images, each time.

Needs the extra `export` (onnx, onnxscript, onnxruntime).
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from adaconv.model.network import STRIDE, StyleTransferNet, padded_side

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
        # As the network pads and crops, but without asking whether it must: a graph has one answer for all sizes.
        height, width = content.shape[-2:]
        for axis, side in ((-2, height), (-1, width)):
            index = torch.arange((side + STRIDE - 1) // STRIDE * STRIDE)  # ONNX rounds quotients to 0
            content = content.index_select(axis, torch.where(index < side, index, 2 * side - 2 - index))
        features = self.network.encoder.relu4_1(content)
        out = self.network.transfer.decode(features, dict(zip(self.names, code, strict=True)))
        return out.index_select(-2, torch.arange(height)).index_select(-1, torch.arange(width))


def smallest_side(network: StyleTransferNet) -> int:
    """Pixels of a content's side that `apply.onnx` takes at least."""
    return padded_side(1, smallest_map=network.transfer.smallest_map)


def export_onnx(
    network: StyleTransferNet, folder: Path | str, *, style_side: int = 256, notes: Mapping[str, str] | None = None
) -> tuple[Path, Path]:
    """Write `style.onnx` and `apply.onnx`, float32, weights inside.

    `style.onnx`: `style` (B, 3, style_side, style_side) in [0, 1] to the tensors of a style code, named as in
    `StyleTransferNet.encode_style`. `apply.onnx`: `content` (B, 3, H, W) in [0, 1], any B, and any H and W from
    `smallest_side` on, and those tensors of the same B, to `stylized` (B, 3, H, W), not clamped.

    Args:
        network: in eval mode, on the CPU.
        folder: made if it is not there.
        style_side: side of styles in pixels; a network is trained with 256.
        notes: kept in both files (`metadata_props`).

    Returns:
        the two files.

    Raises:
        ImportError: onnx or onnxscript is not installed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    style = torch.zeros(2, 3, style_side, style_side)
    with torch.no_grad():
        code = network.encode_style(style)
    names = [name for name in code if name != "descriptor"]  # which the decoder does not read
    of_style, of_content = folder / "style.onnx", folder / "apply.onnx"
    batch = Dim("batch", min=1)
    _write(
        _StyleGraph(network, names),
        (style,),
        of_style,
        notes or {},
        input_names=["style"],
        output_names=names,
        dynamic_shapes={"style": {0: batch}},
    )
    least = smallest_side(network)
    height, width = Dim("height", min=least), Dim("width", min=least)
    _write(
        _ApplyGraph(network, names),
        (torch.zeros(2, 3, 93, 67), [code[name] for name in names]),
        of_content,
        notes or {},
        input_names=["content", *names],
        output_names=["stylized"],
        dynamic_shapes={"content": {0: batch, 2: height, 3: width}, "code": [{0: batch} for _ in names]},
    )
    return of_style, of_content


def _write(
    graph: nn.Module,
    inputs: tuple[Any, ...],
    path: Path,
    notes: Mapping[str, str],
    *,
    dynamic_shapes: Any,
    **names: Any,
) -> None:
    # Exported here, since torch.onnx falls back to fixed sizes, without a word, where any sizes cannot be.
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own parts, that they are to change
        exported = torch.export.export(graph.eval(), inputs, dynamic_shapes=dynamic_shapes)
        program = torch.onnx.export(
            exported, dynamo=True, opset_version=OPSET, verbose=False, dynamic_shapes=dynamic_shapes, **names
        )
    assert program is not None
    program.model.metadata_props.update(notes)
    program.save(path, external_data=False)


def largest_difference(
    network: StyleTransferNet,
    of_style: Path,
    of_content: Path,
    *,
    style_side: int,
    shapes: Sequence[tuple[int, int, int]],
) -> float:
    """How far the two graphs, run by onnxruntime on the CPU, are from the network, in [0, 1] as images are.

    Args:
        network: that was exported.
        of_style: the graph of styles.
        of_content: the graph of contents.
        style_side: of its styles.
        shapes: batch, height and width of contents of noise, which is harder than pictures.

    Raises:
        ImportError: onnxruntime is not installed.
    """
    import onnxruntime

    style_graph, apply_graph = (
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]) for path in (of_style, of_content)
    )
    names = [output.name for output in style_graph.get_outputs()]
    noise = torch.Generator().manual_seed(0)
    largest = torch.zeros(())
    for batch, height, width in shapes:
        style = torch.rand(batch, 3, style_side, style_side, generator=noise)
        content = torch.rand(batch, 3, height, width, generator=noise)
        code = dict(zip(names, style_graph.run(None, {"style": style.numpy()}), strict=True))
        (found,) = apply_graph.run(None, {"content": content.numpy(), **code})
        with torch.no_grad():
            wanted = network(content, style)
        # Unlike Python's, torch's maximum is nan where one of the two is.
        largest = torch.maximum(largest, (torch.from_numpy(found) - wanted).abs().max())
    return float(largest)
