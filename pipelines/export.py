"""A model as two ONNX graphs, for where there is no torch: styles to codes, contents and codes to stylized images.

    python pipelines/export.py --model models:/adaconv@champion --tracking.uri sqlite:///mlflow.db --output exported/

style.onnx  style (B, 3, S, S) in [0, 1], S being --style-side, to the tensors of a style code
apply.onnx  content (B, 3, H, W) in [0, 1], any B, any H and W from 16 on (kernels of 5: 24, of 7: 32), and those
            tensors to stylized (B, 3, H, W), to be clamped

Both are float32, hold their weights and say in their metadata which model they are. They are run by onnxruntime before
they are published, and compared with the network: ends with 1 where they differ by half of one of 255 levels.
"""

import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaconv import cli
from adaconv.config.export import ExportConfig

log = logging.getLogger(__name__)

_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_ADMITTED = 0.5 / 255
_CHECKED = ((1, 256, 256), (3, 120, 152), (2, 67, 93), (1, 333, 211), (4, 64, 64))  # batch, height, width


def plan(config: ExportConfig) -> str:
    _require_onnx()
    from adaconv.tracking.registry import source_of

    return f"{source_of(config.model)[0]} -> style.onnx and apply.onnx in {config.output}"


def execute(config: ExportConfig) -> dict[str, Any]:
    _require_onnx()
    from adaconv import storage
    from adaconv.checkpoint import load_network, public_name
    from adaconv.model.export import export_onnx, largest_difference, smallest_side
    from adaconv.scratch import scratch_folder
    from adaconv.tracking.registry import resolved_model, source_of
    from adaconv.tracking.runs import default_uri

    cli.require_writable(config.output)
    uri, tracked_at = source_of(config.model)
    with resolved_model(uri, tracking_uri=default_uri(config.tracking.uri, Path.cwd(), found=tracked_at)) as (
        model,
        folder,
    ):
        network, info = load_network(folder)
    least = smallest_side(network)
    notes = {"model": model, "model_digest": info.digest, "style_side": config.style_side, "smallest_side": least}
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):  # a line for each constant that was folded
        logging.getLogger(name).setLevel(logging.ERROR)
    with scratch_folder("export") as scratch:
        log.info("%s: tracing, which takes a minute", model)
        told = {f"adaconv.{name}": str(value) for name, value in notes.items()} | {"adaconv.model": public_name(model)}
        graphs = export_onnx(network, scratch, style_side=config.style_side, notes=told)
        log.info("comparing with the network, %d sizes and batches", len(_CHECKED))
        found = largest_difference(network, *graphs, style_side=config.style_side, shapes=_CHECKED)
        compared = [f"{batch} of {width}x{height}" for batch, height, width in _CHECKED]
        result = {**notes, "largest_difference": found, "compared": compared}
        if not found <= _ADMITTED:  # nor nan
            return result | {
                "status": "failed",
                "error": f"expected graphs that are within {_ADMITTED:.4f} of the network, found {found:.4f}; nothing "
                "was published. Report it, with the versions of torch, onnxscript and onnxruntime",
            }
        for graph in graphs:
            where = storage.join(config.output, graph.name)
            storage.publish_file(graph, where)
            result[graph.stem] = where
    return result


def _require_onnx() -> None:
    from adaconv.errors import UsageError

    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"expected {', '.join(_NEEDED)}, found no {', '.join(missing)}: pip install 'adaconv[export]'")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(ExportConfig, argv, prog="pipelines/export.py", doc=__doc__, plan=plan, execute=execute)


if __name__ == "__main__":
    sys.exit(main())
