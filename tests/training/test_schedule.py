import pytest
import torch

from adaconv.training.schedule import learning_rate


def test_one_cycle_is_torchs():
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=101, cycle_momentum=False)
    for step in range(100):
        ours = learning_rate(step, peak=2e-3, schedule="one_cycle", steps=100)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=0.04, abs=2e-8)
        optimizer.step()
        theirs.step()


def test_inverse_time_halves_when_decay_times_step_is_one():
    rates = [learning_rate(s, peak=1e-4, schedule="inverse_time", steps=1, decay=5e-5) for s in (0, 20_000)]
    assert rates == pytest.approx([1e-4, 5e-5])


def test_cosine_falls_from_the_peak_to_nothing():
    rates = [learning_rate(s, peak=1.0, schedule="cosine", steps=10) for s in (0, 5, 10, 20)]
    assert rates == pytest.approx([1.0, 0.5, 0.0, 0.0])


def test_warmup_rises_linearly_and_never_starts_at_nothing():
    rates = [learning_rate(s, peak=1.0, schedule="constant", steps=10, warmup_steps=4) for s in range(6)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
