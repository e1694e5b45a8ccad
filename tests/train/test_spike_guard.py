"""Steps that stand out are left out, by figures worked out with numpy."""

import numpy as np
import pytest
import torch
from train.conftest import make_batch, make_state

from open_lm.train.spike_guard import LEAST, WINDOW, SpikeGuard
from open_lm.train.step import train_step
from open_lm.train.timing import Timing


def test_a_step_is_left_out_exactly_when_it_lies_sigma_deviations_above_the_window():
    generator = np.random.default_rng(0)
    guard, seen = SpikeGuard(sigma=2.0), []
    n_left_out = 0
    for _ in range(400):
        value = float(generator.normal(3, 1))
        window = seen[-WINDOW:]
        expected = len(window) < LEAST or value <= np.mean(window) + 2.0 * np.std(window, ddof=1)
        assert guard.accept(value, 1.0 + 0 * value) == expected
        seen.append(value)
        n_left_out += not expected
    assert 3 < n_left_out < 30


def test_a_gradient_norm_that_stands_out_counts_too_and_a_lower_one_never_does():
    guard = SpikeGuard(sigma=3.0)
    for k in range(LEAST):
        guard.accept(2.0 + 0.01 * (k % 2), 1.0 + 0.01 * (k % 2))
    assert guard.accept(1.0, 0.5)
    assert not guard.accept(2.0, 9.0)


def test_what_is_not_finite_is_no_spike_and_leaves_no_trace():
    guard = SpikeGuard(sigma=3.0)
    assert guard.accept(float("nan"), 1.0)
    assert guard.state_dict() == {"losses": [], "grad_norms": []}


def test_a_restored_guard_decides_like_the_first():
    figures = [(float(a), float(b)) for a, b in np.random.default_rng(1).normal(3, 1, (300, 2))]
    straight = SpikeGuard(sigma=1.5)
    expected = [straight.accept(*pair) for pair in figures]
    first, second = SpikeGuard(sigma=1.5), SpikeGuard(sigma=1.5)
    before = [first.accept(*pair) for pair in figures[:170]]
    second.load_state_dict(first.state_dict())
    assert before + [second.accept(*pair) for pair in figures[170:]] == expected


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion"])
def test_a_step_left_out_changes_neither_weights_nor_moments_but_counts(optimizer):
    state = make_state(optimizer=optimizer)
    train_step(state, make_batch(0), accum=1, clip=None, timing=Timing(torch.device("cpu")))
    state.guard = SpikeGuard(sigma=1.0)
    state.guard.load_state_dict({"losses": [0.1, 0.2] * LEAST, "grad_norms": [100.0, 101.0] * LEAST})
    before = [p.detach().clone() for p in state.model.parameters()]
    moments = [
        {k: torch.as_tensor(v).clone() for k, v in s.items()} for o in state.optimizers for s in o.state.values()
    ]
    report = train_step(state, make_batch(1), accum=1, clip=None, timing=Timing(torch.device("cpu")))
    assert not report.taken and state.step == 2
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))
    after = [s for o in state.optimizers for s in o.state.values()]
    assert all(torch.equal(m[k], torch.as_tensor(a[k])) for m, a in zip(moments, after, strict=True) for k in m)
    assert all(p.grad is None for p in state.model.parameters())
