"""Errors that one rank meets alone in a save: all give that save up, none waits for another, the next succeeds."""

import tempfile

import pytest
from checkpoint.states import STATS, NoData, make_checkpoints, make_state, take_steps
from fsspec.config import conf
from gloo import run_ranks

from open_lm.checkpoint import manager, remote_shards, tree, writing
from open_lm.checkpoint.commit import committed, damaged_file


def fail_once(target, name, error):
    """`target.name` raises the first time, and is then what it was."""
    real = getattr(target, name)

    def failing(*_, **__):
        setattr(target, name, real)
        raise error

    setattr(target, name, failing)


NO_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory")
CASES = {
    "the copy to the host": ("sharded", 1, tree.Staging, "copied", NO_MEMORY),
    "the moment before it writes": ("sharded", 1, manager.faults, "at", OSError(5, "Input/output error")),
    "its part of a gathered state": ("consolidated", 0, tree.Staging, "copy", MemoryError()),
    "a folder for what is sent": ("sharded-remote", 1, tempfile, "TemporaryDirectory", OSError(28, "No space left")),
}


def _save_twice(world, folder):
    conf["local"] = {"auto_mkdir": True}
    for name, (form, rank, *fault) in CASES.items():
        here = folder / name.replace(" ", "-")
        found = make_checkpoints(here, checkpoint_format=form, remote_sync="local://there")
        if form == "sharded-remote":
            found.copy = f"local://{here}/remote"
        state = make_state(world, fsdp=True)
        take_steps(state, 1)
        if world.rank == rank:
            fail_once(*fault)
        found.save(state, NoData(), label="1", stats=STATS)
        assert not found.wait(), name
        assert found.problem == (str(fault[-1]) or "MemoryError"), name
        take_steps(state, 1)
        assert found.save(state, NoData(), label="2", stats=STATS) and found.wait(), name
        if world.is_master:
            (commit,) = committed(found.home)
            assert commit.step == 2 and damaged_file(found.home, commit) is None, name


def test_an_error_on_one_rank_costs_that_save_only(tmp_path):
    run_ranks(_save_twice, 2, tmp_path)


@pytest.mark.parametrize("form", ["sharded", "sharded-remote"])
def test_a_rank_that_is_lost_after_the_commit_takes_no_file_of_it_along(tmp_path, monkeypatch, form):
    """The last exchange fails: what is committed stays."""
    monkeypatch.setitem(conf, "local", {"auto_mkdir": True})
    real = writing.require_none

    def lost(problem, group):
        real(problem, group)
        if committed(found.home):
            raise RuntimeError("Connection closed by peer")

    for module in (writing, remote_shards):
        monkeypatch.setattr(module, "require_none", lost)
    found = make_checkpoints(tmp_path / "here", checkpoint_format=form, remote_sync="local://there")
    found.copy = f"local://{tmp_path}/remote"
    state = make_state()
    take_steps(state, 1)
    found.save(state, NoData(), label="1", stats=STATS, wait=True)
    assert "closed by peer" in found.problem
    (commit,) = committed(found.home)
    assert damaged_file(found.home, commit) is None
