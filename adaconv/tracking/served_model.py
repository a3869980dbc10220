"""The registered model as MLflow loads it: from this code and safetensors, with nothing unpickled.

Inputs are pictures of one size each: `content` and `style`, (1, H, W, 3) uint8; the answer is (1, H, W, 3) uint8.
"""

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from numpy.typing import NDArray

from adaconv.checkpoint import load_network


class ServedStylizer(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    def load_context(self, context: Any) -> None:
        self.network, self.info = load_network(Path(context.artifacts["model"]))

    # Without type hints: MLflow would check inputs by them instead of by the signature, and knows none for arrays.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        content, style = (_to_float(np.asarray(model_input[name])) for name in ("content", "style"))
        with torch.inference_mode():
            stylized = self.network(content, style)
        pixels: NDArray[np.uint8] = stylized.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return pixels


def _to_float(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """(n, H, W, 3) uint8 -> (n, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float().div(255)


mlflow.models.set_model(ServedStylizer())
