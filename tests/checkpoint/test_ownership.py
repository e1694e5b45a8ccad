"""Ownership of checkpoint files: nothing good is lost by going back, by damage, by a newer program, by a second run,
or by a remote that is slow."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from checkpoint.states import STATS, NoData, make_checkpoints, make_state, take_steps

from open_lm import storage
from open_lm.checkpoint import commit as commits
from open_lm.checkpoint import processes, sharded
from open_lm.checkpoint.checksum import checksum_of, record_of
from open_lm.checkpoint.commit import committed
from open_lm.checkpoint.remote_sync import RemoteSync
from open_lm.checkpoint.restore import restore
from open_lm.checkpoint.retention import UNFINISHED, Retention
from open_lm.errors import OpenLMError

FORMATS = ("consolidated", "sharded")


def saved(folder, labels=("1", "2", "3"), steps=10, state=None, **flags):
    """A folder with a checkpoint every `steps` steps, and the state after the last."""
    checkpoints = make_checkpoints(folder, async_save=False, **flags)
    state = state or make_state()
    for label in labels:
        take_steps(state, steps)
        assert checkpoints.save(state, NoData(), label=label, stats=STATS)
    return state


def resumed(folder, name, copy=None, **flags):
    checkpoints = make_checkpoints(folder, async_save=False, resume=str(name), **flags)
    checkpoints.copy = copy
    state = make_state(seed=5)
    restore(checkpoints, state, NoData())
    return checkpoints, state


def files_in(folder):
    """The files of a folder, by name and content."""
    found = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_left_behind_stays_bit_by_bit_whatever_is_saved_later(tmp_path, kind):
    saved(tmp_path, checkpoint_format=kind)
    before = {n: h for n, h in files_in(tmp_path).items() if "_1." not in n and not n.endswith(".json")}
    first = next(p for p in tmp_path.iterdir() if p.name.startswith(("epoch_1.pt", "epoch_1.sharded")))
    checkpoints, state = resumed(tmp_path, first, checkpoint_format=kind)
    for label, steps in (("2", 1), ("2", 9), ("3", 10), ("3", 1)):
        take_steps(state, steps)
        assert checkpoints.save(state, NoData(), label=label, stats=STATS)
    after = files_in(tmp_path)
    assert {name: after.get(name) for name in before} == before
    assert [commit.step for commit in committed(str(tmp_path))] == [31, 30, 20, 11, 10]


def test_going_back_and_on_again_continues_the_last_branch_even_at_an_earlier_step(tmp_path):
    saved(tmp_path)
    for _ in range(2):  # goes back twice, each time fewer steps
        checkpoints, state = resumed(tmp_path, tmp_path / "epoch_1.pt")
        take_steps(state, 5)
        assert checkpoints.save(state, NoData(), label="1-step15", stats=STATS, kind="ephemeral")
        _, again = resumed(tmp_path, "latest")
        assert again.step == 15


@pytest.mark.parametrize("kind", FORMATS)
def test_commit_files_of_a_newer_program_are_read_and_never_deleted(tmp_path, kind):
    state = saved(tmp_path, ("1",), checkpoint_format=kind)
    (commit,) = committed(str(tmp_path))
    fields = {name: value for name, value in asdict(commit).items() if name != "is_newer"}
    for record in fields["files"].values():
        record["crc32c"] = "00000000"
    head = json.dumps({"version": 3, **fields, "signature": "…"}, indent=1).removesuffix("\n}")
    text = f'{head}{commits.OWN_CHECKSUM}{checksum_of(head.encode())}"\n}}'
    (tmp_path / commit.commit_name).write_text(text)
    assert committed(str(tmp_path))[0].is_newer
    before = files_in(tmp_path)
    saved(tmp_path, ("2", "3"), state=state, checkpoint_format=kind, keep_last=1)
    assert before.items() <= files_in(tmp_path).items()
    (tmp_path / commit.commit_name).write_text(text.replace('"step": 10', '"step": 11'))  # now it is damaged, too
    before = files_in(tmp_path)
    saved(tmp_path, ("4",), state=state, checkpoint_format=kind, keep_last=2)
    assert before.items() <= files_in(tmp_path).items()


def test_a_commit_file_of_an_older_program_still_counts_and_its_sha256_is_verified(tmp_path):
    saved(tmp_path, ("1",))
    (commit,) = committed(str(tmp_path))
    files = {
        name: {"size_bytes": record.size_bytes, "sha256": record_of(str(tmp_path / name), "sha256").checksum[7:]}
        for name, record in commit.files.items()
    }
    old = {"label": "1", "step": 10, "files": files, "facts": {"kind": "interval", "config": commit.facts["config"]}}
    (tmp_path / commit.commit_name).write_text(json.dumps(old))
    _, state = resumed(tmp_path, "latest")
    assert state.step == 10
    files["epoch_1.pt"]["sha256"] = "0" * 64
    (tmp_path / commit.commit_name).write_text(json.dumps(old))
    with pytest.raises(Exception, match="damaged"):
        resumed(tmp_path, "latest")


@pytest.mark.parametrize("position", range(0, 100, 7))
def test_a_flipped_bit_anywhere_in_a_commit_file_is_found(tmp_path, position):
    saved(tmp_path, ("1",))
    path = tmp_path / "epoch_1.commit.json"
    content = bytearray(path.read_bytes())
    content[position * len(content) // 100] ^= 1 << (position % 7)
    path.write_bytes(content)
    assert not committed(str(tmp_path))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("alive", [True, False])
def test_only_files_of_saves_that_were_killed_are_swept(tmp_path, kind, alive):
    """`alive`: another process is writing there right now, as a run that was thought dead."""
    code = (
        "import sys, os; sys.path[:0] = ['.', 'tests']\n"
        "from checkpoint.states import *\n"
        "from open_lm.checkpoint import commit\n"
        "def publish(*_):\n"
        "    print('written', flush=True); sys.stdin.read(); os._exit(9)\n"
        "commit.publish = publish\n"
        f"ck = make_checkpoints({str(tmp_path)!r}, checkpoint_format={kind!r}, async_save=False)\n"
        "st = make_state(); take_steps(st, 4); ck.save(st, NoData(), label='1', stats=STATS)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"written\n"
    if not alive:
        other.kill()
        other.wait()
    (tmp_path / "epoch_9.pt").write_text("of OpenLM, without a commit file")
    begun = files_in(tmp_path)
    assert any(name.endswith(UNFINISHED) for name in begun)
    saved(tmp_path, ("1",), 2, checkpoint_format=kind)
    (commit,) = committed(str(tmp_path))
    if alive:
        assert begun.items() <= files_in(tmp_path).items() and commit.label == "1-step2"
        other.kill()
        other.wait()
    else:
        assert commit.label == "1" and set(files_in(tmp_path)) == {*commit.files, commit.commit_name, "epoch_9.pt"}
    assert (tmp_path / "epoch_9.pt").exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_save_that_was_killed_right_after_its_commit_keeps_all_its_files(tmp_path, kind):
    saved(tmp_path, ("1",), checkpoint_format=kind)
    before = files_in(tmp_path)
    (commit,) = committed(str(tmp_path))
    names = [path.name for path in tmp_path.iterdir() if path.name != commit.commit_name]
    begun = {"label": "1", "names": names, "owner": {**processes.identity(), "started": "before the last boot"}}
    (tmp_path / f"epoch_1{UNFINISHED}").write_text(json.dumps(begun))
    Retention(str(tmp_path), None).sweep()
    assert files_in(tmp_path) == before


def test_two_saves_in_one_folder_leave_each_others_shards_alone(tmp_path, monkeypatch):
    mine, other = (make_checkpoints(tmp_path, checkpoint_format="sharded", async_save=False) for _ in "ab")
    ahead, behind = make_state(), make_state()
    take_steps(ahead, 4)
    take_steps(behind, 2)
    real = sharded.write

    def interrupted(folder, *rest):
        records = real(folder, *rest)
        monkeypatch.setattr(sharded, "write", real)
        other.save(behind, NoData(), label="0-step2", stats=STATS)
        assert folder.exists()
        return records

    monkeypatch.setattr(sharded, "write", interrupted)
    assert mine.save(ahead, NoData(), label="1", stats=STATS)
    assert [commit.step for commit in committed(str(tmp_path))] == [4, 2]


def test_a_checkpoint_is_deleted_with_its_commit_file_first(tmp_path, monkeypatch):
    saved(tmp_path, ("1",))
    (commit,) = committed(str(tmp_path))
    removed = []
    monkeypatch.setattr(storage, "remove", lambda path: removed.append(os.path.basename(path)))
    from open_lm.checkpoint.retention import discard

    discard(str(tmp_path), commit)
    assert removed[0] == commit.commit_name and set(removed[1:]) == set(commit.files)


def test_rank_0_checks_that_it_sees_the_shards_of_the_others(tmp_path, monkeypatch):
    real = sharded.write

    def elsewhere(folder, *rest):
        records = real(folder, *rest)
        return records | {"__1_0.distcp": next(iter(records.values()))}  # what a rank on another disk has written

    monkeypatch.setattr(sharded, "write", elsewhere)
    checkpoints = make_checkpoints(tmp_path, checkpoint_format="sharded", async_save=False)
    assert not checkpoints.save(make_state(), NoData(), label="1", stats=STATS)
    assert "all nodes share" in checkpoints.problem and not list(tmp_path.iterdir())


def test_a_run_that_lost_its_folder_commits_nothing(tmp_path):
    def lost():
        raise OpenLMError("another run has taken over this folder")

    checkpoints = make_checkpoints(tmp_path, async_save=False)
    assert checkpoints.save(make_state(), NoData(), label="1", stats=STATS)
    target = replace(checkpoints._target, require_owner=lost)
    with pytest.raises(OpenLMError, match="taken over"):
        target.commit(replace(_snapshot(checkpoints), label="2", step=2), {})
    assert [commit.label for commit in committed(str(tmp_path))] == ["1"]


def _snapshot(checkpoints):
    from open_lm.checkpoint.snapshot import Snapshot

    return Snapshot("1", "interval", 1, 1, {}, {}, STATS)


# The remote copy


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damage_here_deletes_nothing_there_and_is_not_copied(tmp_path, damage):
    run, remote = tmp_path / "run", tmp_path / "remote"
    saved(run / "checkpoints", ("1", "2"))
    sync = RemoteSync(str(run), str(remote), 300)
    sync.sync()
    good = files_in(remote / "checkpoints")
    path = run / "checkpoints" / "epoch_2.pt"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.unlink() if damage == "remove" else path.write_bytes(content[:100] if damage == "truncate" else content)
    sync.sync()
    assert files_in(remote / "checkpoints") == good
    shutil.rmtree(remote)
    with pytest.raises(commits.CheckpointError) if damage == "flip" else _nothing():
        RemoteSync(str(run), str(remote), 300).sync()
    assert [commit.label for commit in committed(str(remote / "checkpoints"))] == ["1"]


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def test_after_going_back_latest_continues_the_new_branch_here_and_on_another_machine(tmp_path):
    run, remote = tmp_path / "run", str(tmp_path / "remote")
    folder, copy = run / "checkpoints", os.path.join(remote, "checkpoints")
    saved(folder)
    RemoteSync(str(run), remote, 300).sync()
    checkpoints, state = resumed(folder, folder / "epoch_1.pt", copy)
    RemoteSync(str(run), remote, 300).sync()
    take_steps(state, 5)
    assert checkpoints.save(state, NoData(), label="1-step15", stats=STATS, kind="ephemeral")
    RemoteSync(str(run), remote, 300).sync()
    for machine in (run, tmp_path / "other"):
        assert resumed(machine / "checkpoints", "latest", copy)[1].step == 15


def test_a_machine_without_the_left_behind_files_does_not_write_over_their_copies(tmp_path):
    remote = str(tmp_path / "remote")
    copy = os.path.join(remote, "checkpoints")
    saved(tmp_path / "a" / "checkpoints")
    RemoteSync(str(tmp_path / "a"), remote, 300).sync()
    before = {n: h for n, h in files_in(copy).items() if not n.endswith(".json")}
    checkpoints, state = resumed(tmp_path / "b" / "checkpoints", os.path.join(copy, "epoch_1.pt"), copy)
    take_steps(state, 10)
    assert checkpoints.save(state, NoData(), label="2", stats=STATS)
    RemoteSync(str(tmp_path / "b"), remote, 300).sync()
    assert before.items() <= files_in(copy).items()
    resumed(tmp_path / "c" / "checkpoints", "latest", copy)
    assert committed(str(tmp_path / "c" / "checkpoints"))[0].branch == 1


def test_with_a_remote_slower_than_the_saves_a_complete_checkpoint_is_always_there(tmp_path, monkeypatch):
    from open_lm.checkpoint import remote_sync

    run, remote = tmp_path / "run", tmp_path / "remote"
    checkpoints, state = make_checkpoints(run / "checkpoints", async_save=False, keep_last=1), make_state()

    def save():
        take_steps(state, 1)
        assert checkpoints.save(state, NoData(), label=str(state.step), stats=STATS)

    save()
    sync = RemoteSync(str(run), str(remote), 300, checkpoints.retention)
    real = remote_sync.upload

    def slow(path, url, expected=None):
        real(path, url, expected)
        if url.endswith(f"optimizer_{state.step}.pt") and state.step < 6:
            save()  # a save ends while files go out
            save()

    monkeypatch.setattr(remote_sync, "upload", slow)
    sync.sync()  # nothing was gone when it was its turn
    there = committed(str(remote / "checkpoints"))
    assert [commit.step for commit in there] == [state.step] and state.step >= 3
    assert [commit.step for commit in committed(str(run / "checkpoints"))] == [state.step]


def test_retention_keeps_what_is_being_copied_and_deletes_it_afterwards(tmp_path):
    state = saved(tmp_path, ("1",))
    retention = Retention(str(tmp_path), 1)
    retention.begin()
    (commit,) = committed(str(tmp_path))
    with retention.pinned(commit):
        saved(tmp_path, ("2",), state=state)
        retention.thin_out()
        assert len(committed(str(tmp_path))) == 2
    assert [c.label for c in committed(str(tmp_path))] == ["2"]
