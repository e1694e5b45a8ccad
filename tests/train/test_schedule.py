"""Learning rates against hand-worked tables, and the arithmetic of intervals."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_lm.errors import ConfigError
from open_lm.train.config import ScheduleConfig
from open_lm.train.run_length import RunLength, build_schedule, even_intervals
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
    steps = even_intervals(train_tokens=10_500, n_intervals=4, tokens_per_step=100)
    assert steps.total_steps == 105
    assert steps.interval_ends == (26, 52, 78, 105)


@given(st.integers(1, 10**7), st.integers(1, 40), st.integers(1, 3000))
def test_interval_ends_never_drift_by_a_batch(total_tokens, n_intervals, tokens_per_step):
    if total_tokens // n_intervals < tokens_per_step:
        with pytest.raises(ConfigError, match="without a step"):
            even_intervals(total_tokens, n_intervals, tokens_per_step * 2)
        return
    steps = even_intervals(total_tokens, n_intervals, tokens_per_step)
    assert steps.total_steps == total_tokens // tokens_per_step
    for k, end in enumerate(steps.interval_ends, 1):
        assert 0 <= total_tokens * k / n_intervals - end * tokens_per_step < tokens_per_step


def test_cooldown_covers_the_last_intervals():
    steps = even_intervals(1000, 10, 10)
    assert steps.cooldown_steps(3) == 30
    assert steps.cooldown_steps(None) == 0
    assert steps.cooldown_steps(99) == 100


def test_wsd_is_flat_and_decays_over_its_share_of_the_run():
    lr = Schedule("wsd", peak=1.0, end=0.0, warmup_steps=2, total_steps=20, cooldown_fraction=0.2)
    assert [lr(s) for s in range(2, 17)] == [1.0] * 15
    assert [lr(s) for s in range(16, 20)] == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_wsd_s_decays_at_the_end_of_every_period_and_goes_on_at_the_peak():
    lr = Schedule("wsd-s", peak=1.0, end=0.0, warmup_steps=2, total_steps=16, cooldown_steps=2, period_ends=(6, 10, 16))
    table = [0.5, 1, 1, 1, 1, 0.5, 1, 1, 1, 0.5, 1, 1, 1, 1, 1, 0.5]
    assert [lr(s) for s in range(16)] == pytest.approx(table)


def test_wsd_s_of_one_period_is_wsd():
    one = Schedule("wsd", 1.0, 0.1, 5, 50, cooldown_fraction=0.3)
    other = Schedule("wsd-s", 1.0, 0.1, 5, 50, cooldown_fraction=0.3, period_ends=(50,))
    assert [one(s) for s in range(50)] == [other(s) for s in range(50)]


def test_lengths_in_tokens_are_turned_into_steps():
    config = ScheduleConfig(lr_scheduler="wsd-s", warmup_tokens=250, lr_decay_tokens=200, lr_period_tokens=(600, 400))
    lr = build_schedule(config, RunLength((4, 10), tokens_per_step=100))
    assert (lr.warmup_steps, lr.cooldown_steps, lr.period_ends) == (2.5, 2, (6, 10))


@pytest.mark.parametrize("tokens", [(600, 600), (10, 900)])
def test_periods_that_do_not_fit_the_run_are_refused(tokens):
    config = ScheduleConfig(lr_scheduler="wsd-s", lr_period_tokens=tokens)
    with pytest.raises(ConfigError, match="lr-period-tokens"):
        build_schedule(config, RunLength((10,), tokens_per_step=100))


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, 5.3583e-6), (363, 0.00194507), (364, 0.00194546), (3267, 0.00194546), (3268, 0.00194492),
        (3630, 5.36e-6), (3631, 0.0), (3632, 0.00194546),
    ],
)  # fmt: skip
def test_wsd_s_in_tokens_has_the_rates_that_olmo_core_gives_a_190m_model(step, expected):
    n_params, batch = 190_354_176, 524_288
    ends = [round(20 * n_params * multiple / batch) for multiple in (0.5, 1, 2, 4)]
    periods = tuple((end - start) * batch for start, end in pairwise([0, *ends]))
    peak = 0.0047 * (n_params / 108e6) ** (-1 / 3) / 2
    config = ScheduleConfig(
        lr=peak, warmup_tokens=n_params, lr_scheduler="wsd-s", lr_period_tokens=periods, lr_read_at="end"
    )
    lr = build_schedule(config, RunLength((ends[-1],), tokens_per_step=batch))
    assert lr(step - 1) == pytest.approx(
        expected, abs=0.51 * 10.0 ** (-8 if expected > 1e-5 else -10 if step == 1 else -8)
    )
    tokens, decay = step * batch, 0.1 * periods[0]
    by_hand = min(peak * tokens / n_params, peak * (periods[0] - tokens) / decay, peak) if step <= ends[0] else peak
    assert lr(step - 1) == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize("shape", ["linear", "cosine", "wsd", "wsd-s", "const-cooldown"])
def test_a_schedule_read_at_the_end_of_steps_reaches_its_end_rate_with_the_last_step(shape):
    at_end = Schedule(shape, 1.0, 0.1, 2.5, 20, cooldown_steps=4.5, at_end=True)
    at_start = Schedule(shape, 1.0, 0.1, 2.5, 20, cooldown_steps=4.5)
    assert at_end(19) == pytest.approx(0.1)
    assert at_start(19) > 0.1
    assert max(map(at_start, range(20))) <= 1
    assert at_end(1) == at_start(1) == pytest.approx(2 / 2.5)
