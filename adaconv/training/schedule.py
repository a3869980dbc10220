"""The learning rate of a step: a pure function, so that a resumed run needs nothing but its step."""

import math
from typing import Literal


def learning_rate(
    step: int,
    *,
    peak: float,
    schedule: Literal["inverse_time", "cosine", "one_cycle", "constant"],
    steps: int,
    decay: float = 0.0,
    warmup_steps: int = 0,
) -> float:
    """Learning rate of the update number `step`, counted from 0.

    Args:
        step: updates done before this one.
        peak: highest rate.
        schedule: `inverse_time` is peak / (1 + decay * step), AdaIN's and its AdaConv descendants' choice;
            `cosine` falls to 0 at `steps`; `one_cycle` rises over the first 30 % from peak / 25 and falls to almost 0,
            both along a cosine (Smith & Topin 2018, torch.optim.lr_scheduler.OneCycleLR); `constant` stays.
        steps: updates of the whole run.
        decay: of `inverse_time`, per step.
        warmup_steps: a linear rise from 0 is laid over the first so many steps.
    """
    done = min(step / max(1, steps), 1.0)
    match schedule:
        case "inverse_time":
            rate = peak / (1 + decay * step)
        case "cosine":
            rate = peak * _half_cosine(done)
        case "one_cycle":
            low, end, rising = peak / 25, peak / 25e4, 0.3
            if done < rising:
                rate = peak + (low - peak) * _half_cosine(done / rising)
            else:
                rate = end + (peak - end) * _half_cosine((done - rising) / (1 - rising))
        case "constant":
            rate = peak
    return rate * min(1.0, (step + 1) / warmup_steps) if warmup_steps else rate


def _half_cosine(done: float) -> float:
    """From 1 at 0 to 0 at 1."""
    return (1 + math.cos(math.pi * done)) / 2
