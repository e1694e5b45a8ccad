"""Errors that one rank meets alone in a save: all give that save up, none waits for another, the next succeeds."""

import tempfile

import pytest
from checkpoint.states import STATS, NoData, make_checkpoints, make_state, take_steps
from fsspec.config import conf
from gloo import run_ranks

from open_lm.checkpoint import manager, remote_shards, space, tree, writing
from open_lm.checkpoint.commit import committed, damaged_file
from open_lm.checkpoint.retention import Retention
from open_lm.checkpoint.snapshot import live
from open_lm.checkpoint.tree import tensors_of
from open_lm.errors import StorageError


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
    "what killed saves left": ("consolidated", 0, Retention, "sweep", OSError(5, "Input/output error")),
    "a store that is away as it begins": ("sharded-remote", 0, manager, "sweep", StorageError("503 SlowDown")),
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


def _space(world, folder):
    state = make_state(world, fsdp=True)
    tree = live(state)
    whole = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(tree))

    def lack(own_disks, *disks):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(space, "_disk_and_space", lambda _: disks[world.rank])
            return space.lack_of_space(world, str(folder), tree, own_disks=own_disks)

    assert not lack(True, ("a", 0.6 * whole), ("b", 0.6 * whole))  # each its half
    assert "no space left" in lack(True, ("a", 0.6 * whole), ("b", 0.3 * whole))
    assert "no space left" in lack(True, ("a", 0.6 * whole), ("a", 0.6 * whole))  # on one disk
    assert not lack(True, ("a", None), ("b", None))
    assert "no space left" in lack(False, ("a", 0.6 * whole), ("b", 2 * whole))  # all on rank 0's
    assert not lack(False, ("a", 1.1 * whole), ("b", 0))


def test_space_is_asked_of_each_disk_for_what_is_written_to_it(tmp_path):
    run_ranks(_space, 2, tmp_path)


def test_older_checkpoints_that_cannot_be_deleted_make_no_save_fail(tmp_path, caplog):
    found, state = make_checkpoints(tmp_path, keep_last=1), make_state()
    for label in ("1", "2", "3"):
        take_steps(state, 1)
        if label == "2":
            fail_once(found.retention, "thin_out", OSError(5, "Input/output error"))
        assert found.save(state, NoData(), label=label, stats=STATS, wait=True)
    assert "not deleted" in caplog.text and [commit.label for commit in committed(str(tmp_path))] == ["3"]


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
