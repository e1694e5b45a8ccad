"""Sharded checkpoints: the same bits on any ranks and in any parallel mode, damage found, nothing run when read."""

import os
import pickle
import shutil

import pytest
import torch
from checkpoint.states import CONFIG, STATS, NoData, assert_same, content, make_checkpoints, make_state, take_steps
from gloo import run_ranks

import open_lm
from open_lm.checkpoint import commit as commits
from open_lm.checkpoint.checksum import record_of
from open_lm.checkpoint.consolidate import main as consolidate
from open_lm.checkpoint.resolve import newest_in
from open_lm.checkpoint.restore import restore
from open_lm.checkpoint.retention import discard
from open_lm.checkpoint.sharded import read_tensor_index, require_complete
from open_lm.errors import CheckpointError, StorageError


def save(folder, state, label="1", **flags):
    checkpoints = make_checkpoints(folder, checkpoint_format="sharded", **flags)
    saved = checkpoints.save(state, NoData(), label=label, stats=STATS, wait=True)
    checkpoints.close()
    return saved


def _save_on_ranks(world, folder, fsdp):
    state = make_state(world, fsdp=fsdp, extra_state=True)
    take_steps(state, 3)
    assert save(folder, state)
    whole = content(state)
    if state.world.is_master:
        torch.save(whole, f"{folder}.pt")


def _continue_on_ranks(world, folder, fsdp):
    again = make_state(world, fsdp=fsdp, seed=1, extra_state=True)
    restore(make_checkpoints(folder, resume="latest"), again, NoData())
    assert_same(content(again), torch.load(f"{folder}.pt", weights_only=True))
    take_steps(again, 2)
    straight = make_state(extra_state=True)
    take_steps(straight, 5)  # rounds otherwise where parameters are cut into odd pieces
    for part in (lambda tree: tree["weights"], lambda tree: tree["optimizer"]["state"]):
        torch.testing.assert_close(part(content(again)), part(content(straight)), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def saved_on_four(tmp_path_factory):
    """The folder of a checkpoint that four FSDP ranks wrote after 3 steps."""
    folder = tmp_path_factory.mktemp("sharded")
    run_ranks(_save_on_ranks, 4, folder, True)
    return folder


@pytest.mark.parametrize(("ranks", "fsdp"), [(2, True), (2, False)], ids=["fsdp", "ddp"])
def test_saved_on_four_continued_on_two(saved_on_four, ranks, fsdp):
    run_ranks(_continue_on_ranks, ranks, saved_on_four, fsdp)


def test_saved_on_four_continued_on_one(saved_on_four):
    _continue_on_ranks(None, saved_on_four, False)


def test_saved_by_ddp_and_by_one_process(tmp_path):
    run_ranks(_save_on_ranks, 2, tmp_path / "ddp", False)
    _save_on_ranks(None, tmp_path / "one", False)
    for name in ("ddp", "one"):
        _continue_on_ranks(None, tmp_path / name, False)


def test_load_model_reads_one_and_consolidating_gives_openlms_files(saved_on_four, tmp_path):
    expected = torch.load(f"{saved_on_four}.pt", weights_only=True)["weights"]
    model = open_lm.load_model(saved_on_four)
    assert_same(dict(model.state_dict()), expected)
    consolidate([str(saved_on_four), "--out", str(tmp_path / "w.pt")])
    alone = torch.load(tmp_path / "w.pt", weights_only=True)
    assert alone["config"]["model"] == CONFIG.to_dict() and alone["step"] == 3
    assert_same(alone["state_dict"], expected)


def test_consolidated_in_place_both_stay_and_the_run_goes_on(tmp_path):
    state = make_state(extra_state=True)
    take_steps(state, 3)
    save(tmp_path / "shards", state)
    plain = make_checkpoints(tmp_path / "plain")
    assert plain.save(state, NoData(), label="1", stats=STATS, wait=True)
    consolidate([str(tmp_path / "shards")])
    for path in (tmp_path / "plain").glob("*_1.pt"):
        left, right = (torch.load(p, weights_only=True) for p in (path, tmp_path / "shards" / path.name))
        assert_same(left, right)
    (commit,) = commits.committed(str(tmp_path / "shards"))
    assert newest_in(str(tmp_path / "shards")).path.endswith("epoch_1.pt")
    again = make_state(seed=1, extra_state=True)
    restore(make_checkpoints(tmp_path / "shards", resume="latest"), again, NoData())
    assert_same(content(again), content(state))
    discard(str(tmp_path / "shards"), commit)
    assert not list((tmp_path / "shards").iterdir())


def files_of(folder):
    (commit,) = commits.committed(str(folder))
    return [folder / name for name in commit.files]


def test_a_part_that_the_index_names_and_no_file_holds_fails_the_save(tmp_path):
    """torch has been seen to report success with tensors missing."""
    save(tmp_path, make_state())
    (index,) = tmp_path.glob("*/.metadata")
    require_complete(index.parent)
    (shard,) = index.parent.glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(StorageError, match="was not written"):
        require_complete(index.parent)
    sizes = {shard.name: shard.stat().st_size + 1}
    require_complete(index.parent, sizes)
    shard.unlink()
    with pytest.raises(StorageError, match="was not written"):
        require_complete(index.parent)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damage_of_any_file_is_found(tmp_path, damage):
    state = make_state()
    save(tmp_path, state)
    for path in files_of(tmp_path):
        good = path.read_bytes()
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 4
        path.unlink() if damage == "remove" else path.write_bytes(bad if damage == "flip" else good[:-1])
        with pytest.raises(CheckpointError):
            restore(make_checkpoints(tmp_path, resume=str(path.parent)), make_state(), NoData())
        path.write_bytes(good)
    restore(make_checkpoints(tmp_path, resume="latest"), make_state(), NoData())


def test_an_index_that_would_run_code_is_not_run_even_if_its_hash_fits(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    save(tmp_path, make_state())
    (index,) = tmp_path.glob("*/.metadata")
    index.write_bytes(pickle.dumps({"state_dict_metadata": Evil()}))
    commit = commits.read_commit(str(tmp_path / "epoch_1.commit.json"))
    commit.files[f"{index.parent.name}/.metadata"] = record_of(str(index))
    commits.publish(str(tmp_path), commit)
    for use in (lambda: open_lm.load_model(tmp_path), lambda: read_tensor_index(index.parent)):
        with pytest.raises(CheckpointError, match="mkdir"):
            use()
    assert not (tmp_path / "canary").exists()


def test_a_part_that_was_not_written_fails_the_save(tmp_path, monkeypatch):
    from torch.distributed.checkpoint import filesystem

    real = filesystem._write_item

    def forgetful(transforms, stream, *args):
        written = real(transforms, stream, *args)
        stream.truncate(0)
        return written

    monkeypatch.setattr(filesystem, "_write_item", forgetful)
    assert not save(tmp_path, make_state())
    assert not list(tmp_path.iterdir())


def _one_rank_fails(world, folder):
    checkpoints = make_checkpoints(folder, checkpoint_format="sharded")
    state = make_state(world, fsdp=True)
    if world.rank == 1:
        from torch.distributed.checkpoint import filesystem

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        real, filesystem._write_item = filesystem._write_item, full
    assert not checkpoints.save(state, NoData(), label="1", stats=STATS, wait=True)
    assert "No space left" in checkpoints.problem
    if world.rank == 1:
        filesystem._write_item = real
    take_steps(state, 1)
    assert checkpoints.save(state, NoData(), label="1", stats=STATS, wait=True)


def test_a_disk_that_is_full_on_one_rank_fails_the_save_on_all_and_the_next_is_good(tmp_path):
    run_ranks(_one_rank_fails, 2, tmp_path)
    (commit,) = commits.committed(str(tmp_path))
    assert commit.step == 1
    assert {path.name for path in tmp_path.iterdir()} == {commit.commit_name, commit.facts["shards"]}


def test_three_failures_in_a_row_end_the_run(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
    checkpoints, state = make_checkpoints(tmp_path, checkpoint_format="sharded"), make_state()
    for _ in range(2):
        assert not checkpoints.save(state, NoData(), label="1", stats=STATS, wait=True)
    with pytest.raises(StorageError, match="No space left"):
        checkpoints.save(state, NoData(), label="1", stats=STATS, wait=True)


def _verify_on_ranks(world, folder):
    """Every file is read by one rank; the newest is damaged, so the one before it is taken."""
    seen = []
    real = commits.matches
    commits.matches = lambda path, record: seen.append(os.path.basename(path)) or real(path, record)
    files = [os.path.basename(name) for commit in commits.committed(str(folder)) for name in commit.files]
    world.wait_for_all()
    state = make_state(world, fsdp=True, seed=5)
    restore(make_checkpoints(folder, resume="latest"), state, NoData())
    everyone = world.gather(seen)
    assert state.step == 3
    assert sorted(name for names in everyone for name in names) == sorted(files)
    assert all(everyone)


def test_checksums_are_shared_among_the_ranks_and_none_is_taken_twice(saved_on_four, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved_on_four, folder)
    state = make_state(seed=5)
    restore(make_checkpoints(folder, resume="latest"), state, NoData())
    step = state.step
    take_steps(state, 1)
    save(folder, state, label="2")
    (newest,) = folder.glob("epoch_2.sharded-*/*.distcp")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert step == 3
    run_ranks(_verify_on_ranks, 2, folder)


def test_files_are_shared_by_size():
    from open_lm.checkpoint.checksum import FileRecord
    from open_lm.checkpoint.verify import shares

    files = {name: FileRecord(size, "xxh3-128:0") for name, size in {"a": 5, "b": 4, "c": 3, "d": 2}.items()}
    assert shares(files, 2) == [["a", "d"], ["b", "c"]]
    assert shares(files, 6) == [["a"], ["b"], ["c"], ["d"], [], []]
