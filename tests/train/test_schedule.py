"""Learning rates against hand-worked tables, and the arithmetic of intervals."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_lm.errors import ConfigError
from open_lm.train.horizon import horizon
from open_lm.train.schedule import SCHEDULES, Schedule


def test_cosine_follows_the_hand_worked_table():
    lr = Schedule("cosine", peak=1.0, end=0.1, warmup_steps=4, total_steps=12)
    assert [lr(s) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr(4) == 1.0
    assert lr(8) == pytest.approx(0.55)
    assert lr(10) == pytest.approx(0.1 + 0.9 * 0.5 * (1 - math.sqrt(0.5)))


def test_const_cooldown_is_flat_and_then_falls_with_the_power():
    lr = Schedule(
        "const-cooldown", peak=1.0, end=0.0, warmup_steps=2, total_steps=10, cooldown_steps=4, cooldown_power=2.0
    )
    assert [lr(s) for s in range(2, 7)] == [1.0] * 5
    assert [lr(s) for s in range(7, 10)] == pytest.approx([0.75**2, 0.5**2, 0.25**2])


def test_linear_and_const():
    assert Schedule("linear", 1.0, 0.0, 0, 4)(1) == 0.75
    assert Schedule("const", 0.3, 0.0, 0, 4)(3) == 0.3


def test_a_floor_holds_after_warmup_only():
    lr = Schedule("cosine", peak=1.0, end=0.0, warmup_steps=10, total_steps=20, floor=0.4)
    assert lr(0) == 0.1
    assert lr(19) == 0.4


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(0, 50), st.integers(1, 50), st.integers(0, 60))
def test_every_shape_stays_between_end_and_peak_whatever_the_lengths(shape, warmup, total, cooldown):
    lr = Schedule(shape, 1.0, 0.1, warmup, total, cooldown_steps=cooldown)
    for step in range(total + 1):
        assert 0 < lr(step) <= 1.0
        assert step < warmup or lr(step) >= 0.1 - 1e-12


def test_tokens_asked_are_tokens_trained_to_the_batch():
    steps = horizon(total_tokens=10_500, n_intervals=4, tokens_per_step=100)
    assert steps.total_steps == 105
    assert steps.interval_ends == (26, 52, 78, 105)


@given(st.integers(1, 10**7), st.integers(1, 40), st.integers(1, 3000))
def test_interval_ends_never_drift_by_a_batch(total_tokens, n_intervals, tokens_per_step):
    if total_tokens // n_intervals < tokens_per_step:
        with pytest.raises(ConfigError, match="without a step"):
            horizon(total_tokens, n_intervals, tokens_per_step * 2)
        return
    steps = horizon(total_tokens, n_intervals, tokens_per_step)
    assert steps.total_steps == total_tokens // tokens_per_step
    for k, end in enumerate(steps.interval_ends, 1):
        assert 0 <= total_tokens * k / n_intervals - end * tokens_per_step < tokens_per_step


def test_cooldown_covers_the_last_intervals():
    steps = horizon(1000, 10, 10)
    assert steps.cooldown_steps(3) == 30
    assert steps.cooldown_steps(None) == 0
    assert steps.cooldown_steps(99) == 100
