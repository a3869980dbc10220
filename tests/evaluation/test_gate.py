"""Who may take whose place: what is worse is kept out, and so is what only looks better by chance."""

import numpy as np
import pytest

from adaconv.evaluation.gate import change, compare, interval, judge

MARGINS = dict.fromkeys(("content", "structure", "style", "gram", "colour"), 0.05)
LOOSE = dict.fromkeys(MARGINS, 1000.0)  # so that chance has only to find one metric that is better


def pictures(rng, contents=20, styles=40):
    """What pictures do to every model's scores: some contents and some styles are hard."""
    return rng.normal(size=(contents, 1)) * 0.5 + rng.normal(size=(1, styles)) * 0.5


def model(rng, hard, change=0.0, of="style", own=0.05):
    """Scores of a model that finds some contents and styles harder than others do; `change` of a metric's level."""
    scores = {}
    for name in MARGINS:
        likes = rng.normal(size=(hard.shape[0], 1)) + rng.normal(size=(1, hard.shape[1])) + rng.normal(size=hard.shape)
        scores[name] = np.exp(hard + own * likes) * (1 + (change if name == of else 0))
    return scores


def test_the_same_model_again_is_no_better():
    scores = model(np.random.default_rng(0), pictures(np.random.default_rng(1)))
    found = compare(scores, scores, margins=MARGINS)
    assert [(one.change, one.at_most, one.better) for one in found] == [(0, 0, False)] * len(MARGINS)
    verdict = judge(found, require="better")
    assert not verdict.promoted
    assert "no metric is better" in verdict.reasons[0]
    assert judge(found, require="not_worse").promoted


def test_a_better_model_gets_the_place_and_a_worse_one_does_not():
    rng = np.random.default_rng(2)
    hard = pictures(rng)
    old = model(rng, hard, own=0.01)
    assert judge(compare(model(rng, hard, -0.2, own=0.01), old, margins=MARGINS), require="better").promoted
    for name in MARGINS:
        worse = judge(compare(model(rng, hard, 0.2, of=name, own=0.01), old, margins=MARGINS), require="not_worse")
        assert not worse.promoted
        assert [reason.split()[0] for reason in worse.reasons] == [name]


def test_better_in_one_does_not_pay_for_worse_in_another():
    rng = np.random.default_rng(3)
    hard = pictures(rng)
    old, new = model(rng, hard, own=0.01), model(rng, hard, -0.5, own=0.01)
    new["content"] = new["content"] * 1.2
    verdict = judge(compare(new, old, margins=MARGINS), require="better")
    assert not verdict.promoted
    assert "content" in verdict.reasons[0]
    assert judge(compare(new, old, margins=MARGINS | {"content": 1000.0}), require="better").promoted


def test_a_hundred_models_that_are_as_good_are_not_promoted_by_chance():
    """They like other contents and other styles, which pairs that were drawn one by one would take for proof."""
    rng = np.random.default_rng(4)
    lucky = lucky_pairwise = promoted = 0
    for _ in range(100):
        hard = pictures(rng)
        old, new = model(rng, hard), model(rng, hard)
        lucky += judge(compare(new, old, margins=LOOSE), require="better").promoted
        promoted += judge(compare(new, old, margins=MARGINS), require="better").promoted
        lucky_pairwise += any(_z(new[name], old[name]) < -2.33 for name in MARGINS)  # 1 %, a fifth of 5
    print(f"by any metric alone {lucky}, with the margins {promoted}, pairs one by one {lucky_pairwise} of 100")
    assert promoted <= 5
    assert 1 <= lucky <= 10  # 5 are expected
    assert lucky_pairwise > 50


def _z(new, old):
    """How many standard errors a ratio of means is from 1, if every pair stood for itself."""
    ratio = new.mean() / old.mean()
    error = (new - ratio * old).std() / np.sqrt(new.size) / old.mean()
    return (ratio - 1) / error


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_no_improvement(broken):
    rng = np.random.default_rng(5)
    hard = pictures(rng)
    old, new = model(rng, hard), model(rng, hard, -0.3)
    new["style"][3, 4] = broken
    verdict = judge(compare(new, old, margins=LOOSE), require="not_worse")
    assert not verdict.promoted
    assert "style" in verdict.reasons[0]
    # Who has the place and such scores is replaced by anybody with better ones.
    found = compare(old, new, margins=LOOSE)
    assert [(one.metric, one.change, one.better) for one in found if one.change == -1] == [("style", -1.0, True)]


def test_nothing_wrong_is_asked_of_the_first_and_defects_keep_anybody_out():
    assert judge([], require="better", first=True).promoted
    verdict = judge([], require="better", first=True, defects=["the outputs are grey"])
    assert not verdict.promoted
    assert verdict.reasons == ("the outputs are grey",)


def test_an_interval_holds_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(6)
    inside = 0
    for _ in range(100):
        told = interval(rng.normal(size=(20, 1)) + rng.normal(size=(1, 40)) + rng.normal(size=(20, 40)))
        inside += told.low <= 0 <= told.high
    assert 88 <= inside <= 99


def test_a_change_on_the_same_pairs_is_surer_than_two_intervals():
    """Where pictures differ far more than models, and as often right as it says."""
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(100):
        hard = pictures(rng)
        new, old = model(rng, hard, change=-0.05)["style"], model(rng, hard)["style"]
        told = change(new, old)
        apart = [interval(one) for one in (new, old)]
        assert apart[0].high > apart[1].low  # they overlap
        assert told.high - told.low < 0.3 * (apart[1].high - apart[1].low) / apart[1].mean
        inside += told.low <= -0.05 <= told.high
    assert 88 <= inside <= 99
