"""Deletions and writing over: nothing goes before the run knows where it goes on from, nor once the folder is
another's, and nothing in the remote copy is written over."""

import hashlib
import shutil

import pytest
from checkpoint.states import STATS, NoData, make_checkpoints, make_state, take_steps
from runs import folder_of, run, write_data

from open_lm.checkpoint.commit import committed
from open_lm.checkpoint.remote_sync import RemoteSync
from open_lm.checkpoint.retention import LEFT_BEHIND, Retention
from open_lm.errors import ConfigError, FolderLocked

FOUR = ["--num-checkpoints", "4"]


@pytest.fixture
def manifest(tmp_path):
    return write_data(tmp_path / "data", (200,))


def labels(folder):
    return [commit.label for commit in committed(str(folder))]


def saved(folder, names, *, state=None, **flags):
    state, checkpoints = state or make_state(), make_checkpoints(folder, async_save=False, **flags)
    for label in names:
        take_steps(state, 1)
        assert checkpoints.save(state, NoData(), label=label, stats=STATS)
    return state, checkpoints


def contents(folder):
    """The hashes of all files of weights."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.pt")}


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("source", ["local", "remote"])
def test_going_back_under_keep_last_and_a_copy_loses_neither_that_checkpoint_nor_its_later_ones(
    tmp_path, manifest, source
):
    """The copy begins once it is known where the run goes on from: what is newer is set aside by then, not deleted."""
    copy = ["--remote-sync", str(tmp_path / "copy")]
    run(tmp_path, manifest, *FOUR, *(copy if source == "remote" else ()))
    here, there = folder_of(tmp_path) / "checkpoints", tmp_path / "copy" / "run" / "checkpoints"
    folder, machine = (here, tmp_path) if source == "local" else (there, tmp_path / "other")
    before = contents(folder)
    started = ["--resume", str(folder / "epoch_1.pt"), *copy, "--keep-last", "1", "--stop-at-step", "4"]
    assert run(machine, manifest, *FOUR, *started).step == 4
    left = {name: digest for name, digest in before.items() if "_1." not in name}
    assert left.items() <= contents(folder).items()
    assert len(list(folder.glob(f"epoch_*{LEFT_BEHIND}"))) == 3


def test_nothing_is_deleted_before_it_is_known_where_the_run_goes_on_from(tmp_path):
    saved(tmp_path / "run" / "checkpoints", "123")
    retention = Retention(str(tmp_path / "run" / "checkpoints"), 1)
    sync = RemoteSync(str(tmp_path / "run"), str(tmp_path / "copy"), 300, retention)
    sync.sync()
    retention.thin_out()
    assert labels(tmp_path / "run" / "checkpoints") == labels(tmp_path / "copy" / "checkpoints") == ["3", "2", "1"]
    retention.begin()
    sync.sync()
    retention.thin_out()
    assert labels(tmp_path / "run" / "checkpoints") == labels(tmp_path / "copy" / "checkpoints") == ["3"]


def test_who_has_lost_the_folder_copies_and_deletes_nothing_more(tmp_path):
    def lost():
        raise FolderLocked("another run has taken over this folder.")

    folder, copy = tmp_path / "run" / "checkpoints", tmp_path / "copy" / "checkpoints"
    state, mine = saved(folder, "1", keep_last=1)
    sync = RemoteSync(str(tmp_path / "run"), str(tmp_path / "copy"), 300, mine.retention)
    sync.sync()
    mine.require_owner = lost
    saved(folder, "234", state=state)  # the new owner keeps all
    for deed in (sync.sync, mine.retention.thin_out, mine.retention.sweep):
        with pytest.raises(FolderLocked):
            deed()
    with sync:  # it ends at once
        pass
    assert labels(folder) == ["4", "3", "2", "1"] and labels(copy) == ["1"]
    RemoteSync(str(tmp_path / "run"), str(tmp_path / "copy"), 300).sync()
    with pytest.raises(FolderLocked):
        mine.retention.thin_out_copy(str(copy))
    assert labels(copy) == ["4", "3", "2", "1"]


def test_of_two_machines_that_do_not_see_each_other_the_one_that_started_last_has_the_copy(tmp_path):
    copy = tmp_path / "copy" / "checkpoints"
    state, mine = saved(tmp_path / "a" / "checkpoints", "1", keep_last=1)
    zombie = RemoteSync(str(tmp_path / "a"), str(tmp_path / "copy"), 300, mine.retention)
    zombie.sync()
    shutil.copytree(tmp_path / "a" / "checkpoints", tmp_path / "b" / "checkpoints")
    saved(tmp_path / "b" / "checkpoints", "234", state=state)
    RemoteSync(str(tmp_path / "b"), str(tmp_path / "copy"), 300).sync()
    with pytest.raises(FolderLocked, match="another run copies to this place"):
        zombie.sync()
    assert labels(copy) == ["4", "3", "2", "1"]


@pytest.mark.parametrize("state", ["set aside", "damaged"])
def test_a_new_start_writes_over_nothing_in_the_copy(tmp_path, manifest, state):
    """Whatever the commit files there are worth: their labels are taken, and without --resume the start is refused."""
    words = [*FOUR, "--remote-sync", str(tmp_path / "copy")]
    run(tmp_path, manifest, *words)
    there = tmp_path / "copy" / "run" / "checkpoints"
    for path in there.glob("epoch_*.commit.json"):
        flip(path) if state == "damaged" else path.rename(str(path).replace(".commit.json", LEFT_BEHIND))
    before = contents(there)
    shutil.rmtree(folder_of(tmp_path))
    with pytest.raises(ConfigError, match="already holds a run"):
        run(tmp_path, manifest, *words, "--seed", "5")
    run(tmp_path, manifest, name="elsewhere")
    with pytest.raises(ConfigError, match="already holds a run"):
        run(tmp_path, manifest, *words, "--resume", str(folder_of(tmp_path, "elsewhere") / "checkpoints/epoch_1.pt"))
    if state == "set aside":
        run(tmp_path, manifest, *words, "--resume", "latest", "--seed", "5", "--stop-at-step", "6")
        assert labels(there) == ["2-step6", "1-step3"]
    assert before.items() <= contents(there).items()


def test_a_label_that_is_anothers_in_the_copy_stays_that_ones(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        saved(tmp_path / name / "checkpoints", "1", state=make_state(seed=seed))
    RemoteSync(str(tmp_path / "a"), str(tmp_path / "copy"), 300).sync()
    before = contents(tmp_path / "copy" / "checkpoints")
    for name in ("epoch_1.commit.json", "epoch_1.left-behind.json", "damaged"):
        if name == "damaged":
            flip(tmp_path / "copy" / "checkpoints" / "epoch_1.left-behind.json")
        elif name != "epoch_1.commit.json":
            (tmp_path / "copy" / "checkpoints" / "epoch_1.commit.json").rename(tmp_path / "copy" / "checkpoints" / name)
        with pytest.raises(Exception, match="another checkpoint 1, which stays"):
            RemoteSync(str(tmp_path / "b"), str(tmp_path / "copy"), 300).sync()
        assert contents(tmp_path / "copy" / "checkpoints") == before
    RemoteSync(str(tmp_path / "a"), str(tmp_path / "copy"), 300).sync()  # its own is the same, and counts again
    assert labels(tmp_path / "copy" / "checkpoints") == ["1"]
