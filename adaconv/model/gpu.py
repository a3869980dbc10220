"""The kernels for GPUs, or None where torch cannot run them: only its builds for CUDA bring Triton."""

from importlib import import_module
from typing import Any

import torch


def _kernels(name: str) -> Any:
    return import_module(f"adaconv.model.{name}") if torch.version.cuda is not None else None


maps, adaptive_conv = _kernels("maps_gpu"), _kernels("adaptive_conv_gpu")
