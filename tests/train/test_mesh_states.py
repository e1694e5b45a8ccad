"""A state saved under one mesh is, bit by bit, the state that another mesh resumes with: weights, moments, averages."""

import dataclasses

import pytest
import torch
from checkpoint.states import STATS, NoData, assert_same, make_checkpoints, whole
from gloo import run_ranks
from train.test_meshes import BATCH, MODELS, batch, make_state

from open_lm.checkpoint.restore import restore
from open_lm.checkpoint.snapshot import in_file_order, live
from open_lm.checkpoint.tree import EXTRA_STATE, map_tensors
from open_lm.distributed import World
from open_lm.train.averagers import parse_averagers
from open_lm.train.averaging import WeightAverage
from open_lm.train.config import ParallelConfig, mesh_shape
from open_lm.train.step import train_step
from open_lm.train.timing import Timing


def state_on(world, mesh, name, optimizer):
    parallel = ParallelConfig(mesh=mesh)
    world = dataclasses.replace(world, mesh=mesh_shape(parallel, world.size))
    state = make_state(world, parallel, MODELS[name], optimizer)
    state.averages.append(WeightAverage(parse_averagers("ema_0.5_1")[0], state.model))
    return state


def go(state, steps):
    for _ in range(steps):
        n = BATCH // state.world.shape.n_data
        rows = list(batch(state.step).split(BATCH // n))[state.world.data_rank]
        rows = rows if state.part is None else rows.of_part(state.part)
        train_step(state, rows, accum=1, clip=1.0, timing=Timing(state.world.device))


def content(state):
    """Everything as files have it: whole tensors, their rows in order."""
    tree = in_file_order(live(state), state.model)
    return map_tensors(tree, lambda _, tensor: whole(tensor.detach()).clone())


def _saved(world, folder, mesh, name, optimizer, form):
    state = state_on(world, mesh, name, optimizer)
    go(state, 3)
    checkpoints = make_checkpoints(folder, checkpoint_format=form)
    assert checkpoints.save(state, NoData(), label="1", stats=STATS, wait=True)
    checkpoints.close()
    saved = content(state)
    go(state, 3)
    later = content(state)["weights"]
    if state.world.is_master:
        torch.save((saved, later), f"{folder}.pt")


def _resumed(world, folder, meshes, name, optimizer):
    for mesh in meshes:
        state = state_on(world or World(), mesh, name, optimizer)
        restore(make_checkpoints(folder, resume="latest"), state, NoData())
        saved, later = torch.load(f"{folder}.pt", weights_only=True)
        for part in ("weights", EXTRA_STATE):
            assert_same(content(state)[part], saved[part], where=f"{mesh} {part}")
        assert_same(content(state)["optimizer"]["state"], saved["optimizer"]["state"], where=f"{mesh} optimizer")
        if optimizer == "adamw":
            go(state, 3)
            torch.testing.assert_close(content(state)["weights"], later, rtol=1e-5, atol=5e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "others", "name", "optimizer", "form"),
    [
        ("tp=2,fsdp=2", ["cp=2,tp=2", "dp=2,fsdp=2"], "tied, qk norm", "muon", "sharded"),
        ("cp=2,tp=2", ["fsdp=4", "tp=4"], "by head, biases", "adamw", "consolidated"),
        ("ep=2,tp=2", ["fsdp=4", "ep=4"], "experts", "adamw", "sharded"),
    ],
)
def test_a_state_is_the_same_to_the_bit_under_any_other_mesh(tmp_path, first, others, name, optimizer, form):
    folder = tmp_path / "run"
    run_ranks(_saved, 4, folder, first, name, optimizer, form)
    run_ranks(_resumed, 4, folder, others, name, optimizer)
    run_ranks(_resumed, 1, folder, ["dp=1"], name, optimizer)


@pytest.mark.slow
def test_from_tensor_parallel_to_sharded_and_to_one_process(tmp_path):
    folder = tmp_path / "run"
    run_ranks(_saved, 2, folder, "tp=2", "shared keys, qk norm", "adamw", "sharded")
    run_ranks(_resumed, 2, folder, ["fsdp=2", "cp=2"], "shared keys, qk norm", "adamw")
    run_ranks(_resumed, 1, folder, ["dp=1"], "shared keys, qk norm", "adamw")


@pytest.mark.slow
def test_from_eight_ranks_to_one_and_to_three(tmp_path):
    folder, name = tmp_path / "run", "tied, qk norm"
    run_ranks(_saved, 8, folder, "dp=2,fsdp=2,tp=2", name, "muon", "sharded")
    run_ranks(_resumed, 1, folder, ["dp=1"], name, "muon")
    run_ranks(_resumed, 3, folder, ["fsdp=3", "dp=3"], name, "muon")
