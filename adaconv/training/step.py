"""One optimizer update: batch in, weights changed, losses out. Plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from adaconv.errors import NonFiniteError
from adaconv.training import distributed
from adaconv.training.losses import style_transfer_losses
from adaconv.training.recorded import RecordedGradients
from adaconv.training.schedule import learning_rate
from adaconv.training.state import TrainState

if TYPE_CHECKING:  # any objects with their attributes serve; torch is all that is needed
    from adaconv.config.model import LossConfig
    from adaconv.config.train import OptimConfig
    from adaconv.data.loader import Batch


@dataclass
class StepResult:
    """`losses` are this rank's share of the global batch's means: summed over ranks they are the means."""

    losses: dict[str, Tensor]
    learning_rate: float
    gradient_norm: float


def train_step(state: TrainState, batch: Batch, *, optim: OptimConfig, loss: LossConfig) -> StepResult:
    """Do the update number `state.step` with this rank's share of its batch, and count it.

    Raises:
        NonFiniteError: a loss or gradient is not finite; the weights have not been changed.
    """
    rate = learning_rate(
        state.step,
        peak=optim.learning_rate,
        schedule=optim.schedule,
        steps=optim.steps,
        decay=optim.decay,
        warmup_steps=optim.warmup_steps,
    )
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]
    state.optimizer.zero_grad(set_to_none=True)
    losses = _accumulate_gradients(state, batch, optim, loss)
    norm = torch.nn.utils.clip_grad_norm_(state.network.transfer.parameters(), optim.clip_norm or float("inf"))
    # Whether the update is done is decided where the norm is, so that nothing waits for it.
    state.optimizer.found_inf = norm.isfinite().logical_not().float()  # type: ignore[attr-defined]
    state.optimizer.step()
    gradient_norm = norm.item()
    if not math.isfinite(gradient_norm):  # gradients are averaged, so every rank sees this and stops at the same step
        raise NonFiniteError(_not_finite(state.step, gradient_norm, losses, batch))
    state.step += 1
    state.update_average()
    return StepResult(losses, rate, gradient_norm)


def _not_finite(step: int, gradient_norm: float, losses: dict[str, Tensor], batch: Batch) -> str:
    """The message that every rank gives: it names the samples of those ranks whose own losses are not finite."""
    values = {name: value.item() for name, value in losses.items()}
    told = [
        (
            all(map(math.isfinite, values.values())),
            f"rank {rank} had "
            + ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            + f" of contents {contents} and styles {styles}",
        )
        for rank, (values, contents, styles) in enumerate(
            distributed.gather((values, batch.content_keys, batch.style_keys))
        )
    ]
    guilty = [text for finite, text in told if not finite] or [text for _, text in told]
    return (
        f"step {step}: the norm of the gradient is {gradient_norm}; {'; '.join(guilty)}. The weights are those of the "
        "step before; lower train.learning_rate or loss.style_weight, or set train.precision to float32"
    )


def _accumulate_gradients(state: TrainState, batch: Batch, optim: OptimConfig, loss: LossConfig) -> dict[str, Tensor]:
    pairs = len(batch.content)
    size = min(optim.micro_batch_size or pairs, pairs)
    if size == pairs and _can_record(state, optim):
        losses = _recorded(state, batch, optim, loss)
    else:
        losses = _in_parts(state, batch, size, optim, loss)
    if state.at_once:
        dtype = torch.bfloat16 if state.gradient_compression == "bfloat16" else None
        distributed.average_gradients(state.transfer.parameters(), dtype=dtype)
    return losses


def _in_parts(state: TrainState, batch: Batch, size: int, optim: OptimConfig, loss: LossConfig) -> dict[str, Tensor]:
    """Gradients of so many pairs at a time."""
    pairs = len(batch.content)
    totals: dict[str, Tensor] = {}
    for first in range(0, pairs, size):
        content, style = (images[first : first + size] for images in (batch.content, batch.style))
        with _no_reduction(state, unless=first + size >= pairs):
            losses = _gradients(state, content, style, optim, loss)
        for name, value in losses.items():
            totals[name] = totals.get(name, 0) + value
    return totals


def _gradients(
    state: TrainState, content: Tensor, style: Tensor, optim: OptimConfig, loss: LossConfig
) -> dict[str, Tensor]:
    """Add the gradients of these pairs, (n, 3, S, S) uint8, to the weights'; returns their share of the losses."""
    device = next(state.network.transfer.parameters()).device
    share = len(content) / optim.global_batch_size
    content, style = (_to_device(images, device, optim.channels_last) for images in (content, style))
    losses = _losses(state, content, style, optim, loss)
    # The sum of the ranks' gradients is divided by their number; shares may differ by rank.
    (losses["loss"] * share * distributed.num_ranks()).backward()  # type: ignore[no-untyped-call]
    return {name: value.detach() * share for name, value in losses.items()}


def _can_record(state: TrainState, optim: OptimConfig) -> bool:
    """Not with DDP, whose reduction is part of the backward pass, nor of compiled code, which has its own ways."""
    alone = state.transfer is state.network.transfer
    return optim.cuda_graph and alone and not optim.compile and next(state.transfer.parameters()).is_cuda


def _recorded(state: TrainState, batch: Batch, optim: OptimConfig, loss: LossConfig) -> dict[str, Tensor]:
    which = (len(batch.content), state.step % 2 if loss.identity_weight else 0)  # of what `_losses` decides by
    if which not in state.recorded:
        state.recorded[which] = RecordedGradients(
            lambda content, style: _gradients(state, content, style, optim, loss),
            state.transfer.parameters(),
            batch.content,
            batch.style,
        )
    return state.recorded[which](batch.content, batch.style)


def _losses(
    state: TrainState, content: Tensor, style: Tensor, optim: OptimConfig, loss: LossConfig
) -> dict[str, Tensor]:
    encoder = state.network.encoder
    with torch.autocast(content.device.type, torch.bfloat16, enabled=optim.precision == "bfloat16"):
        with torch.no_grad():
            if content.is_cuda:  # in one pass: a GPU likes one better than two
                together = encoder(torch.cat([content, style]))
                content_features = together[-1][: len(content)]
                style_features = tuple(features[len(content) :] for features in together)
            else:
                content_features, style_features = encoder.relu4_1(content), encoder(style)
            identity = None
            wanted, styled_as = content_features, style_features[-1]
            if loss.identity_weight:  # in one pass: DDP and the GPU like one better than two
                of_content, of_style = (content, content_features), (style, style_features[-1])
                identity, itself = of_content if state.step % 2 == 0 else of_style
                wanted, styled_as = torch.cat([wanted, itself]), torch.cat([styled_as, itself])
        images = state.transfer(wanted, styled_as)
        output, reconstructed = images[: len(content)], images[len(content) :]
        return (_compiled_losses() if optim.compile else style_transfer_losses)(
            output,
            encoder(output),
            content_features,
            style_features,
            content_weight=loss.content_weight,
            style_weight=loss.style_weight,
            content_target=loss.content_target,
            identity=None if identity is None else (reconstructed, identity),
            identity_weight=loss.identity_weight,
            tv_weight=loss.tv_weight,
        )


@cache
def _compiled_losses() -> Callable[..., dict[str, Tensor]]:
    return torch.compile(style_transfer_losses)  # which imports the compiler: seconds


def _to_device(images: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """(n, 3, S, S) uint8 -> float32 in [0, 1] on the device: bytes travel, not floats."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(device, non_blocking=True).to(torch.float32, memory_format=layout).div_(255)


def _no_reduction(state: TrainState, *, unless: bool) -> AbstractContextManager[None]:
    """Gradients are reduced over the ranks once, with the last micro-batch."""
    if isinstance(state.transfer, DistributedDataParallel) and not unless:
        return state.transfer.no_sync()
    return nullcontext()
