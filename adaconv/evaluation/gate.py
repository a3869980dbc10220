"""Whether one model may take another one's place, from the scores of both on the same pairs.

Contents and styles are samples of what the model will meet, and every pair shares its content and its style with many
others: both are drawn anew, with replacement, and a pair counts as often as its content times its style (the pigeonhole
bootstrap; Owen, Annals of Applied Statistics 2007). Drawing pairs one by one would take them for independent, and find
differences where there are none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
Require = Literal["better", "not_worse"]

_CONFIDENCE = 0.95  # of one-sided bounds
_DRAWS = 4000
_SEED = 0


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """How much a metric changed, as a share of what it was: `change` -0.05 is 5 % lower, which is better.

    `at_most`: what the change is below with a confidence of 95 %; `better`: whether it is below 0 with the confidence
    that is left when all metrics are looked at; `worse_allowed`: the margin.
    """

    metric: str
    change: float
    at_most: float
    better: bool
    worse_allowed: float

    @property
    def not_worse(self) -> bool:
        return self.at_most <= self.worse_allowed

    @property
    def verdict(self) -> str:
        return "better" if self.better else "not worse" if self.not_worse else "may be worse"

    def __str__(self) -> str:
        return f"{self.metric} {100 * self.change:+.1f} % (at most {100 * self.at_most:+.1f} %): {self.verdict}"


@dataclass(frozen=True)
class Verdict:
    """`reasons`: why it may not; none where it may. `comparisons` are empty where there was nothing to compare with."""

    promoted: bool
    reasons: tuple[str, ...]
    comparisons: tuple[Comparison, ...]


def interval(scores: Array) -> Interval:
    """Of scores (contents, styles); one column where there are no styles."""
    low, high = (_bound(_drawn_means(scores), scores.mean(), scores.shape, level) for level in (0.025, 0.975))
    return Interval(float(scores.mean()), low, high)


def compare(new: Mapping[str, Array], old: Mapping[str, Array], *, margins: Mapping[str, float]) -> list[Comparison]:
    """Two models on the same pairs, metric by metric.

    Args:
        new: of the model that is to take the place; metric -> scores (contents, styles), lower is better.
        old: of the one that has it.
        margins: metric -> the share by which it may be worse.
    """
    alone = (1 - _CONFIDENCE) / len(margins)  # what each may err, so that all together err no more than one
    found = []
    for metric, margin in margins.items():
        changes, change = _changes(new[metric], old[metric])
        at_most, surely = (_bound(changes, change, new[metric].shape, level) for level in (_CONFIDENCE, 1 - alone))
        found.append(Comparison(metric, change, at_most, surely < 0, margin))
    return found


def change(new: Array, old: Array) -> Interval:
    """By what share of it a metric is another one on the same pairs: scores (contents, styles) of two models.

    Far narrower than what the two intervals leave open: what is hard for one is hard for the other.
    """
    changes, found = _changes(new, old)
    low, high = (_bound(changes, found, new.shape, level) for level in (0.025, 0.975))
    return Interval(found, low, high)


def _changes(new: Array, old: Array) -> tuple[Array, float]:
    """(draws,) changes of the mean, and the change that was found."""
    before, after = _drawn_means(old), _drawn_means(new)
    with np.errstate(divide="ignore", invalid="ignore"):
        changes = after / before - 1
        found = new.mean() / old.mean() - 1
    changes = np.where(after == before, 0.0, changes)  # also where both are 0
    found = 0.0 if new.mean() == old.mean() else float(found)
    if np.isfinite(new).all() and not np.isfinite(old).all():
        changes, found = np.full_like(changes, -1.0), -1.0  # any number is better than none
    return changes, found


def judge(
    comparisons: Sequence[Comparison], *, require: Require, defects: Sequence[str] = (), first: bool = False
) -> Verdict:
    """Whether a model may take the place.

    Args:
        comparisons: with the one that has it.
        require: `better`: no metric may be worse, and one must be better; `not_worse`: no metric may be worse.
        defects: what is wrong with the model by itself.
        first: nobody has the place yet.
    """
    reasons = list(defects)
    reasons += [str(one) for one in comparisons if not one.not_worse]
    if not reasons and not first and require == "better" and not any(one.better for one in comparisons):
        reasons.append("no metric is better; with --gate.require not_worse it need not be")
    return Verdict(not reasons, tuple(reasons), tuple(comparisons))


def _bound(drawn: Array, found: float, shape: tuple[int, ...], level: float) -> float:
    """A quantile of what was drawn, as far from what was found as so few contents or styles ask for.

    Drawn with replacement, n values spread by sqrt((n - 1) / n) too little, and their tails are those of the normal
    distribution instead of Student's: of 20 x 40 models that are equally good 7 % looked better instead of 5.
    """
    fewest = min(count for count in shape if count > 1)
    wider = math.sqrt(fewest / (fewest - 1)) * stats.t.ppf(level, fewest - 1) / stats.norm.ppf(level)
    return float(found + (np.quantile(drawn, level) - found) * wider)


def _drawn_means(scores: Array) -> Array:
    """(draws,): means of scores (contents, styles), with the same draws for all scores of a shape."""
    contents, styles = _draws(*scores.shape)
    with np.errstate(invalid="ignore"):  # an infinite score times none of it is no number, and neither is the mean
        means: Array = ((contents @ scores) * styles).sum(axis=1)
    return means


@lru_cache(maxsize=4)
def _draws(contents: int, styles: int) -> tuple[Array, Array]:
    """(draws, contents) and (draws, styles): what each counts for in a draw; a row adds up to 1."""
    rng = np.random.default_rng(_SEED)
    drawn = [rng.multinomial(count, np.full(count, 1 / count), size=_DRAWS) / count for count in (contents, styles)]
    return drawn[0], drawn[1]
