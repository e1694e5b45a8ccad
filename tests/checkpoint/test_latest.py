"""The checkpoint of --resume latest: the newest sound one of those here and in the remote copy, whatever is damaged."""

import json
import shutil

import pytest
from checkpoint.states import STATS, NoData, assert_same, content, make_checkpoints, make_state, take_steps

from open_lm.checkpoint import commit as commits
from open_lm.checkpoint.commit import COMMITTED, LEFT_BEHIND, OWN_CHECKSUM, committed, damaged_file
from open_lm.checkpoint.consolidate import consolidate
from open_lm.checkpoint.load_model import load_model
from open_lm.checkpoint.read import read_checkpoint
from open_lm.checkpoint.remote_sync import RemoteSync
from open_lm.checkpoint.restore import restore
from open_lm.errors import CheckpointError, StorageError


@pytest.fixture(params=["consolidated", "sharded"])
def places(tmp_path, request):
    """A folder with three checkpoints, of 1, 2 and 3 steps, and its remote copy."""
    here, there = tmp_path / "run" / "checkpoints", tmp_path / "copy" / "checkpoints"
    saved(here, "123", checkpoint_format=request.param)
    RemoteSync(str(tmp_path / "run"), str(tmp_path / "copy"), 300).sync()
    return here, there


def saved(folder, names, *, state=None, **flags):
    state, checkpoints = state or make_state(), make_checkpoints(folder, async_save=False, **flags)
    for label in names:
        take_steps(state, 1)
        assert checkpoints.save(state, NoData(), label=label, stats=STATS)
    return state


def resumed(folder, copy, name="latest", **flags):
    checkpoints = make_checkpoints(folder, async_save=False, resume=str(name), **flags)
    checkpoints.copy = str(copy)
    state = make_state(seed=5)
    restore(checkpoints, state, NoData())
    straight = make_state()
    take_steps(straight, state.step)
    assert_same(content(state), content(straight))
    return state.step


def flip(folder, *labels, part=0):
    """Flip a bit in a file of each of these checkpoints: the largest, or the `part`-th in size."""
    for label in labels:
        files = [path for path in folder.rglob("*") if f"_{label}." in str(path) and path.suffix in (".pt", ".distcp")]
        path = sorted(files, key=lambda path: -path.stat().st_size)[part]
        changed = bytearray(path.read_bytes())
        changed[len(changed) // 2] ^= 1
        path.write_bytes(changed)


def state_of(folder):
    """The checkpoints that count, those that are sound, and those that were set aside."""
    found = committed(str(folder))
    sound = [commit.step for commit in found if damaged_file(str(folder), commit) is None]
    return [commit.step for commit in found], sound, len(list(folder.glob(f"*{LEFT_BEHIND}")))


WHOLE = [3, 2, 1], [3, 2, 1], 0


@pytest.mark.parametrize("labels", ["3", "32", "321"])
def test_a_checkpoint_that_is_damaged_here_is_completed_from_the_copy_and_stays_there(places, labels):
    here, there = places
    flip(here, *labels)
    assert resumed(here, there) == 3
    assert state_of(there) == WHOLE and 3 in state_of(here)[1] and state_of(here)[2] == 0


@pytest.mark.parametrize("n_here", [0, 2])
def test_a_damaged_copy_of_the_newest_is_skipped_on_a_machine_that_lacks_it(places, n_here):
    here, there = places
    flip(there, "3")
    for path in list(here.glob("*_3.*" if n_here else "*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for _ in range(2):
        assert resumed(here, there) == 2
    assert state_of(here)[1][0] == 2 and state_of(there) == ([2, 1], [2, 1], 1)
    assert not [path for path in here.rglob("*") if "epoch_3" in str(path) and path.is_file()]


def test_what_is_damaged_here_and_what_is_damaged_there_make_one_sound_checkpoint(places):
    here, there = places
    flip(here, "3", part=0)
    flip(there, "3", part=1)
    assert resumed(here, there) == 3 and state_of(here) == WHOLE


def test_where_all_are_damaged_here_and_there_the_run_ends_and_everything_stays(places):
    here, there = places
    for folder in places:
        flip(folder, *"123")
    before = [state_of(folder) for folder in places]
    with pytest.raises(CheckpointError, match="all 3 checkpoints are damaged"):
        resumed(here, there)
    assert [state_of(folder) for folder in places] == before


def test_a_store_that_does_not_answer_ends_the_start_and_sets_nothing_aside(places, monkeypatch, tmp_path):
    here, there = places

    def away(*_):
        raise StorageError("no answer")

    monkeypatch.setattr(commits, "copy", away)
    with pytest.raises(StorageError, match="no answer"):
        resumed(tmp_path / "elsewhere" / "checkpoints", there)
    flip(here, "3")
    with pytest.raises(StorageError, match="no answer"):
        resumed(here, there)
    assert state_of(there) == WHOLE and state_of(here)[2] == 0


def test_another_machines_checkpoint_of_the_same_label_is_read_where_it_is(tmp_path):
    """This machine was killed before its third was copied; another has gone on from the second meanwhile."""
    here, there = tmp_path / "run" / "checkpoints", tmp_path / "copy" / "checkpoints"
    state = saved(here, "12")
    RemoteSync(str(tmp_path / "run"), str(tmp_path / "copy"), 300).sync()
    saved(here, "3", state=state)
    other = make_state()
    take_steps(other, 4)
    saved(tmp_path / "other" / "checkpoints", "3", state=other)
    RemoteSync(str(tmp_path / "other"), str(tmp_path / "copy"), 300).sync()
    before = {path.name: path.read_bytes() for path in here.glob("*.pt")}
    assert [commit.step for commit in committed(str(there))] == [5, 2, 1]
    assert resumed(here, there) == 5
    assert {path.name: path.read_bytes() for path in here.glob("*.pt")} == before


def test_a_machine_that_still_holds_what_another_has_left_goes_on_with_the_new_branch(tmp_path):
    here, there, other = (tmp_path / name / "checkpoints" for name in ("run", "copy", "other"))
    saved(here, "123")
    RemoteSync(str(tmp_path / "run"), str(tmp_path / "copy"), 300).sync()
    checkpoints = make_checkpoints(other, async_save=False, resume=str(there / "epoch_1.pt"))
    checkpoints.copy = str(there)
    state = make_state()
    restore(checkpoints, state, NoData())
    take_steps(state, 1)
    assert checkpoints.save(state, NoData(), label="1-step2", stats=STATS)
    RemoteSync(str(tmp_path / "other"), str(tmp_path / "copy"), 300).sync()
    assert resumed(here, there) == 2 and state_of(here)[0] == [2, 3, 2, 1]  # of the new branch first


# By name


def test_a_checkpoint_that_was_set_aside_is_verified_when_it_is_asked_for(places):
    here, there = places
    first = next(path for path in here.iterdir() if path.name.startswith(("epoch_1.pt", "epoch_1.sharded")))
    assert resumed(here, there, first) == 1
    third = str(first).replace("epoch_1.", "epoch_3.") if first.suffix == ".pt" else None
    third = third or next(str(path) for path in here.iterdir() if path.name.startswith("epoch_3.sharded"))
    load_model(third)
    load_model(str(here / f"epoch_3{LEFT_BEHIND}"))
    flip(here, "3", part=0)
    flip(here, "3", part=1)
    for name in (third, str(here / f"epoch_3{LEFT_BEHIND}")):
        with pytest.raises(CheckpointError, match="does not have the hash"):
            load_model(name)
        with pytest.raises(CheckpointError, match="does not have the hash"):
            resumed(here, there, name)


@pytest.mark.parametrize("ending", [COMMITTED, LEFT_BEHIND])
def test_a_file_whose_commit_file_is_damaged_is_refused_by_name(tmp_path, ending):
    saved(tmp_path, "1")
    path = tmp_path / f"epoch_1{COMMITTED}"
    path = path.rename(tmp_path / f"epoch_1{ending}")
    path.write_text(path.read_text().replace('"step": 1', '"step": 2'))
    with pytest.raises(CheckpointError, match=rf"epoch_1{ending} is damaged.*another checkpoint"):
        read_checkpoint(str(tmp_path / "epoch_1.pt"))
    (tmp_path / "other_1.pt").write_bytes((tmp_path / "epoch_1.pt").read_bytes())  # somebody's own, beside them
    assert read_checkpoint(str(tmp_path / "other_1.pt"))["step"] == 1


def test_what_a_newer_program_wrote_is_not_consolidated_by_this_one(tmp_path):
    saved(tmp_path, "1", checkpoint_format="sharded")
    path = tmp_path / f"epoch_1{COMMITTED}"
    fields = json.loads(path.read_text()) | {"version": 3, "holds": "for ever"}
    del fields["checksum"]
    head = json.dumps(fields, indent=1).removesuffix("\n}")
    path.write_text(f'{head}{OWN_CHECKSUM}{commits.checksum_of(head.encode())}"\n}}')
    before = sorted(path.name for path in tmp_path.iterdir()), path.read_text()
    with pytest.raises(CheckpointError, match="a newer OpenLM wrote it"):
        consolidate(str(tmp_path))
    assert (sorted(path.name for path in tmp_path.iterdir()), path.read_text()) == before
