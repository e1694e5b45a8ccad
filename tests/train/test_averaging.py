"""Running averages of the weights against their definitions over stored iterates."""

import math
from dataclasses import replace

import pytest
import torch
from checkpoint.states import make_state as make_ranked_state
from gloo import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from train.conftest import CONFIG, make_batch, make_state

from open_lm.data.batch import Batch
from open_lm.errors import ConfigError
from open_lm.model import create_model
from open_lm.train.averagers import cosine, parse_averagers, poly
from open_lm.train.averaging import WeightAverage
from open_lm.train.step import average_losses, train_step
from open_lm.train.timing import Timing


def iterates_and_average(name, n_steps, every=1):
    """The first weights and those after each step, as vectors, and the average kept along."""
    state = make_state()
    (spec,) = parse_averagers(name)
    state.averages.append(WeightAverage(spec, state.model))
    vectors = [vector(state)]
    for k in range(n_steps):
        train_step(state, make_batch(k), accum=1, clip=None, timing=Timing(torch.device("cpu")))
        vectors.append(vector(state))
    with state.averages[0].in_place():
        average = vector(state)
    assert torch.equal(vector(state), vectors[-1])  # the weights themselves are back
    return torch.stack(vectors[::every]), average


def vector(state):
    return torch.cat([p.detach().double().flatten() for p in state.model.parameters()])


def test_ema_is_the_recurrence_written_out():
    vectors, average = iterates_and_average("ema_0.9_2", 6, every=2)
    weights = torch.tensor([0.9**3, 0.1 * 0.9**2, 0.1 * 0.9, 0.1], dtype=torch.float64)
    torch.testing.assert_close(average, weights @ vectors, rtol=1e-5, atol=1e-6)


def test_poly_0_is_the_mean_of_all_iterates():
    vectors, average = iterates_and_average("poly_0_1", 5)
    torch.testing.assert_close(average, vectors[1:].mean(0), rtol=1e-5, atol=1e-6)


def test_cosine_weighs_iterates_by_half_a_sine_and_starts_anew():
    vectors, average = iterates_and_average("cosine_4_1", 6)  # two into the second period
    weights = torch.tensor([math.sin(math.pi / 8), math.sin(3 * math.pi / 8)], dtype=torch.float64)
    torch.testing.assert_close(average, (weights / weights.sum()) @ vectors[5:], rtol=1e-5, atol=1e-6)


@given(st.integers(1, 60), st.floats(0, 12))
def test_poly_weighs_the_nth_iterate_by_its_rising_power(n, eta):
    weights = shares_to_weights([poly(k, eta) for k in range(1, n + 1)])
    expected = [math.gamma(k + eta) / math.gamma(k) if k + eta < 60 else None for k in range(1, n + 1)]
    if None not in expected:
        assert weights == pytest.approx([e / sum(expected) for e in expected], rel=1e-6, abs=1e-12)


@given(st.integers(1, 40))
def test_a_whole_period_of_cosine_is_the_sine_window(period):
    weights = shares_to_weights([cosine(k, period) for k in range(1, period + 1)])
    window = [math.sin(math.pi * (k - 0.5) / period) for k in range(1, period + 1)]
    assert weights == pytest.approx([w / sum(window) for w in window])


def shares_to_weights(shares):
    """The final weight of each iterate, from the share it had when it was added."""
    weights = []
    for share in shares:
        weights = [w * (1 - share) for w in weights] + [share]
    return weights


def test_the_loss_of_an_average_is_that_of_a_model_with_its_weights():
    state = make_state()
    state.averages.append(WeightAverage(parse_averagers("ema_0.5_1")[0], state.model))
    for k in range(3):
        train_step(state, make_batch(k), accum=1, clip=None, timing=Timing(torch.device("cpu")))
    other = make_state()
    other.model.load_state_dict(state.averages[0].state_dict()["state_dict"], strict=False)
    batch = make_batch(9)
    expected = other.task.loss_sums(other.model, batch).parts[0] / batch.n_targets
    assert average_losses(state, batch, accum=2) == {"ema_0.5_1": pytest.approx(expected.item(), rel=1e-6)}


@pytest.mark.parametrize("text", ["ema_0.9", "ema_1.0_1", "mean_1_1", "poly_-1_1", "cosine_2.5_1", "ema_0.9_0"])
def test_what_is_no_averager_is_refused_by_name(text):
    with pytest.raises(ConfigError, match=f"--averagers .*{text}"):
        parse_averagers(f"poly_8_1,{text}")


def test_a_tied_weight_is_averaged_under_both_names():
    tied = create_model(replace(CONFIG, weight_tying=True))
    average = WeightAverage(parse_averagers("ema_0.5_1")[0], tied)
    with torch.no_grad():
        tied.tok_embeddings.weight.add_(1.0)
    average.update(step=1)
    stored = average.state_dict()["state_dict"]
    assert stored.keys() == tied.state_dict().keys()
    torch.testing.assert_close(stored["output.weight"], tied.output.weight - 0.5)
    assert torch.equal(stored["output.weight"], stored["tok_embeddings.weight"])


def test_an_average_of_openlm_says_only_its_step_and_goes_on():
    model = make_state().model
    spec = parse_averagers("poly_8_2")[0]
    average, again = WeightAverage(spec, model), WeightAverage(spec, model)
    weights = average.state_dict()["state_dict"]
    again.load_state_dict({"step": 12, "av_param": 8, "state_dict": weights})
    assert again.state_dict()["n"] == 6


def _average_losses(world):
    state = make_ranked_state(world, fsdp=True, extra_state=True)
    generator = torch.Generator().manual_seed(world.rank)
    batch = Batch.from_samples(torch.randint(37, (2, 13), generator=generator))
    for _ in range(2):
        train_step(state, batch, accum=2, clip=1.0, timing=Timing(torch.device("cpu")))
        losses = average_losses(state, batch, accum=2)
        assert all(0 < loss < 10 for loss in losses.values())


def test_averages_are_measured_between_steps_under_fsdp():
    run_ranks(_average_losses, 2)
