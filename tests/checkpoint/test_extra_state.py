"""Extra state beside the weights: restored bit by bit on any number of ranks, started fresh where it is absent."""

import pytest
import torch
from checkpoint.states import (
    AVERAGE,
    CONFIG,
    STATS,
    NoData,
    assert_same,
    content,
    make_checkpoints,
    make_state,
    take_steps,
)
from gloo import run_ranks

import open_lm
from open_lm.checkpoint.restore import restore
from open_lm.precision import Precision


def save(folder, state):
    assert make_checkpoints(folder).save(state, NoData(), label="1", stats=STATS, wait=True)


def restored(folder, **kwargs):
    state = make_state(seed=1, **kwargs)
    restore(make_checkpoints(folder, resume="latest"), state, NoData())
    return state


def test_extra_state_comes_back_bit_by_bit_and_loads_as_a_model(tmp_path):
    state = make_state(extra_state=True)
    take_steps(state, 3)
    save(tmp_path, state)
    assert_same(content(restored(tmp_path, extra_state=True)), content(state))
    path = tmp_path / f"{AVERAGE}_1.pt"
    expected = state.averages[0].state_dict()["state_dict"]
    assert torch.equal(open_lm.load_model(path).output.weight, expected["output.weight"])
    assert torch.load(path, weights_only=True)["config"]["model"] == CONFIG.to_dict()


def test_extra_state_the_checkpoint_lacks_begins_anew_from_its_weights(tmp_path, caplog):
    state = make_state()
    take_steps(state, 3)
    save(tmp_path, state)
    late = restored(tmp_path, extra_state=True).averages[0].state_dict()
    assert late["n"] == 0 and f"holds no {AVERAGE}" in caplog.text
    assert torch.equal(late["state_dict"]["output.weight"], state.model.output.weight)


def _save_sharded(world, folder, fsdp):
    state = make_state(world, fsdp=fsdp, extra_state=True)
    take_steps(state, 3)
    save(folder, state)


def _compare(world, folder, fsdp):
    straight = make_state(world, fsdp=fsdp, extra_state=True)
    take_steps(straight, 5)
    again = restored(folder, world=world, fsdp=fsdp, extra_state=True)
    take_steps(again, 2)
    assert_same(content(again), content(straight))


@pytest.mark.parametrize("fsdp", [True, False], ids=["fsdp", "ddp"])
def test_two_ranks_save_and_continue_extra_state(tmp_path, fsdp):
    run_ranks(_save_sharded, 2, tmp_path, fsdp)
    run_ranks(_compare, 2, tmp_path, not fsdp)


def test_the_loss_scale_goes_on_where_it_was(tmp_path):
    state = make_state()
    state.precision = Precision("fp16", "cpu")
    state.precision.scaler.scale(torch.ones(1))  # it is made at its first use
    state.precision.scaler.update(new_scale=3.0)
    take_steps(state, 2)
    assert make_checkpoints(tmp_path, async_save=False).save(state, NoData(), label="1", stats=STATS)
    again = make_state(seed=5)
    again.precision = Precision("fp16", "cpu")
    restore(make_checkpoints(tmp_path, resume="latest"), again, NoData())
    assert again.precision.state_dict() == state.precision.state_dict()
    assert again.precision.state_dict()["scale"] == 3.0
