"""The few collectives that training needs; without a process group they are what one rank alone would see."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Sum each scalar over the ranks, in one collective. Every rank gets the sums."""
    stacked = torch.stack([value.detach().float().reshape(()) for value in values.values()])
    if dist.is_initialized():
        dist.all_reduce(stacked)
    return dict(zip(values, stacked.tolist(), strict=True))


def average_gradients(weights: Iterable[nn.Parameter], *, dtype: torch.dtype | None = None) -> None:
    """Give each weight the mean of the ranks' gradients, by one collective over all of them.

    Args:
        weights: all have a gradient on every rank.
        dtype: that the gradients travel in; None leaves them as they are.
    """
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients]).to(dtype).div_(num_ranks())
    dist.all_reduce(together)
    parts = torch.split(together, [gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view(one.shape) for part, one in zip(parts, gradients, strict=True)])


def largest(value: int, device: torch.device) -> int:
    """The largest of the ranks' values; a barrier."""
    tensor = torch.tensor(value, device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor.item())


def barrier(device: torch.device) -> None:
    largest(0, device)


def gather(value: T) -> list[T]:
    """What each rank says, in order of ranks; small objects, now and then."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def copy_from_first_rank(module: nn.Module) -> None:
    """Give every rank the first one's parameters and buffers, so that one rank may prepare them."""
    if dist.is_initialized():
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)
