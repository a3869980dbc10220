"""Forward and backward of a rank's batch as one CUDA graph: recorded once, then started as a whole.

A step is a thousand kernels, and a small batch is done with them faster than Python can start them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Losses = dict[str, Tensor]


class RecordedGradients:
    """Replays what `compute` did when it was recorded, on other images of the same shape.

    Args:
        compute: of contents and styles (B, 3, S, S) uint8 on the GPU; leaves gradients in `weights` and returns losses.
        weights: whose memory must stay where it is.
        content, style: the first batch; nothing of it is kept.
    """

    def __init__(
        self, compute: Callable[[Tensor, Tensor], Losses], weights: Iterable[Tensor], content: Tensor, style: Tensor
    ) -> None:
        self._weights = list(weights)
        self._content, self._style = content.to("cuda"), style.to("cuda")
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is made once must not be recorded: handles, plans, compiled kernels
            compute(self._content, self._style)
        torch.cuda.current_stream().wait_stream(stream)
        for weight in self._weights:
            weight.grad = None
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, which decode images and pin memory, may go on meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._losses = compute(self._content, self._style)
        self._gradients = [weight.grad for weight in self._weights]

    def __call__(self, content: Tensor, style: Tensor) -> Losses:
        """Gradients of this batch in the weights, and its losses."""
        self._content.copy_(content, non_blocking=True)
        self._style.copy_(style, non_blocking=True)
        self._graph.replay()
        for weight, gradient in zip(self._weights, self._gradients, strict=True):
            weight.grad = gradient
        return {name: loss.clone() for name, loss in self._losses.items()}
