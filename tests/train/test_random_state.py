"""Random numbers: other ones on each rank, and the same after a resume."""

import torch
from checkpoint.states import STATS, NoData, make_checkpoints, make_state, take_steps
from gloo import run_ranks

from open_lm.checkpoint.restore import restore
from open_lm.train.random_state import seed_rank


def drawn(n=4):
    return torch.rand(n).tolist()


def save(folder, state):
    assert make_checkpoints(folder).save(state, NoData(), label="1", stats=STATS, wait=True)


def _save(world, folder):
    state = make_state(world)
    seed_rank(0, world.rank)
    take_steps(state, 1)
    save(folder, state)
    torch.save(drawn(), folder / f"next-{world.rank}.pt")


def _resume(world, folder):
    restore(make_checkpoints(folder, resume="latest"), make_state(world, seed=7), NoData())
    assert drawn() == torch.load(folder / f"next-{world.rank}.pt")


def _resume_on_three(world, folder):
    restore(make_checkpoints(folder, resume="latest"), make_state(world, seed=7), NoData())
    torch.save(drawn(), folder / f"three-{world.rank}.pt")


def test_every_rank_goes_on_with_its_own_numbers_and_other_ranks_begin_new_ones(tmp_path):
    seed_rank(0, 0)
    first = drawn()
    seed_rank(0, 1)
    assert drawn() != first
    run_ranks(_save, 2, tmp_path)
    assert torch.load(tmp_path / "next-0.pt") != torch.load(tmp_path / "next-1.pt")
    run_ranks(_resume, 2, tmp_path)
    run_ranks(_resume_on_three, 3, tmp_path)
    assert len({str(torch.load(tmp_path / f"{name}.pt")) for name in ("three-0", "three-1", "three-2", "next-0")}) == 4
