"""The remote copy as a mirror: one failure keeps nothing else back, no log gets shorter there or here, requests do not
grow with the checkpoints that are kept."""

import json
import os
import threading

import fsspec
import pytest
from checkpoint.states import STATS, NoData, make_checkpoints, make_state, take_steps
from runs import folder_of, run, write_data

from open_lm import faults
from open_lm.checkpoint import remote_sync
from open_lm.checkpoint.commit import committed
from open_lm.checkpoint.fetch import LISTING, bring_back_logs
from open_lm.checkpoint.remote_sync import OWNER, RemoteSync
from open_lm.errors import CheckpointError, ConfigError, StorageError


def saved(folder, names, *, state=None, kind="interval", **flags):
    state, checkpoints = state or make_state(), make_checkpoints(folder, async_save=False, **flags)
    for label in names:
        take_steps(state, 1)
        assert checkpoints.save(state, NoData(), label=label, stats=STATS, kind=kind)
    return state


def labels(folder):
    return [commit.label for commit in committed(str(folder))]


@pytest.fixture
def place(tmp_path):
    """A run folder with a checkpoint for ever, two others and logs, and where it is copied to."""
    state = saved(tmp_path / "run" / "checkpoints", ["0-step1"], kind="fixed")
    saved(tmp_path / "run" / "checkpoints", "12", state=state)
    for name in ("a.log", "metrics.jsonl", "out.log"):
        (tmp_path / "run" / name).write_text(f"{name} 1\n{name} 2\n")
    return tmp_path


@pytest.fixture
def broken(monkeypatch):
    """`broken(name, times)`: so many uploads of files with that name fail; of a remote when `kind` says so."""

    def fail(part, times=1 << 30, kind=OSError):
        left = [times]

        def injector(event, value):
            if event == "upload" and part in str(value) and left[0]:
                left[0] -= 1
                raise kind(5, "Input/output error") if kind is OSError else kind("no answer")
            return value

        monkeypatch.setattr(faults, "_injector", injector)

    monkeypatch.setattr(remote_sync, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(remote_sync, "LONGEST_PAUSE_SECONDS", 0.001)
    return fail


def sync_of(place, **options):
    return RemoteSync(str(place / "run"), str(place / "copy"), 300, **options)


@pytest.mark.parametrize("part", ["epoch_0-step1.pt", "a.log", "epoch_2.commit"])
def test_a_file_that_fails_for_ever_keeps_nothing_else_from_being_copied_and_is_named_at_the_end(
    place, broken, part, caplog
):
    broken(part)
    with sync_of(place):
        pass
    lacking = {"epoch_0-step1.pt": "0-step1", "epoch_2.commit": "2"}.get(part)
    there = place / "copy" / "checkpoints"
    assert labels(there) == [label for label in ("2", "1", "0-step1") if label != lacking]
    logs = {path.name for path in (place / "copy").iterdir() if path.is_file()}
    assert logs == {"a.log", "metrics.jsonl", "out.log", LISTING, OWNER} - {part}
    said = [record for record in caplog.records if record.levelname == "ERROR"]
    name = part if lacking is None else f"epoch_{lacking}.commit.json"
    assert [record.getMessage().partition(" ")[0] for record in said] == [name]


@pytest.mark.parametrize(("part", "kind"), [("epoch_2.pt", OSError), ("out.log", OSError), ("", StorageError)])
def test_the_last_pass_is_repeated_until_nothing_is_left(place, broken, part, kind, caplog):
    broken(part, times=7 if kind is StorageError else 2, kind=kind)
    with sync_of(place):
        pass
    assert labels(place / "copy" / "checkpoints") == ["2", "1", "0-step1"] and (place / "copy" / "out.log").exists()
    assert "tried again" in caplog.text and not [r for r in caplog.records if r.levelname == "ERROR"]


def test_a_store_that_is_away_is_not_asked_for_every_file_and_ends_the_wait(place, broken, monkeypatch):
    asked = []
    broken("", kind=StorageError)
    inner = faults._injector
    monkeypatch.setattr(faults, "_injector", lambda *what: (asked.append(what), inner(*what))[1])
    with sync_of(place):
        pass
    n_files = 3 * remote_sync.FAILURES_IN_A_ROW  # of as many checkpoints; no log is tried then
    assert n_files < sum(event == "upload" for event, _ in asked) <= n_files * (remote_sync.LAST_PASSES + 1)


def test_an_error_that_nobody_foresaw_does_not_end_the_copying(place, monkeypatch, broken):
    broken("nothing", times=0)
    real, calls = RemoteSync._pass, []

    def failing(self):
        calls.append(1)
        if len(calls) < 3:
            raise RuntimeError("a bug")
        return real(self)

    monkeypatch.setattr(RemoteSync, "_pass", failing)
    with sync_of(place):
        pass
    assert labels(place / "copy" / "checkpoints") == ["2", "1", "0-step1"]


# Logs


def test_what_was_copied_once_stays_listed_after_a_restart(place):
    trace = place / "run" / "trace-1.json"
    trace.write_text("{}")
    sync_of(place).sync()
    trace.unlink()
    sync_of(place).sync()
    assert "trace-1.json" in json.loads((place / "copy" / LISTING).read_text())
    bring_back_logs(str(place / "copy"), str(place / "run"))
    assert trace.read_text() == "{}"
    (place / "copy" / LISTING).write_text("[")  # damaged: the run starts without it, and the next pass makes it anew
    bring_back_logs(str(place / "copy"), str(place / "run"))
    sync_of(place).sync()
    assert "out.log" in json.loads((place / "copy" / LISTING).read_text())


def test_a_log_that_is_cut_off_while_the_run_is_at_work_stays_whole_there(place):
    sync = sync_of(place)
    sync.sync()
    (place / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="was cut off"):
        sync.sync()
    assert (place / "copy" / "metrics.jsonl").read_text() == "metrics.jsonl 1\nmetrics.jsonl 2\n"


@pytest.mark.parametrize("ahead", ["here", "there"])
@pytest.mark.parametrize("lost", ["all", "end", "nothing"])
def test_a_start_completes_the_logs_here_and_there_whoever_is_ahead(place, ahead, lost):
    """Of two logs of which one goes on where the other ends the longer counts, wherever the newest checkpoint is."""
    path = place / "run" / "metrics.jsonl"
    sync_of(place).sync()
    whole = path.read_text()
    if ahead == "here":
        saved(place / "run" / "checkpoints", "3", state=None)
    else:
        (place / "run" / "checkpoints" / "epoch_2.commit.json").unlink()
    if lost == "nothing":
        path.write_text(whole + "metrics.jsonl 3\n")
        whole = path.read_text()
    else:
        path.write_text("" if lost == "all" else whole[: len(whole) // 2])
    bring_back_logs(str(place / "copy"), str(place / "run"))
    assert path.read_text() == whole
    sync_of(place).sync()
    assert (place / "copy" / "metrics.jsonl").read_text() == whole


@pytest.mark.parametrize("ahead", ["here", "there"])
def test_of_logs_that_differ_those_of_the_newer_checkpoint_count(place, ahead):
    sync_of(place).sync()
    if ahead == "there":
        (place / "run" / "checkpoints" / "epoch_2.commit.json").unlink()
    (place / "run" / "out.log").write_text("another way, longer than the one there\n")
    bring_back_logs(str(place / "copy"), str(place / "run"))
    assert (place / "run" / "out.log").read_text().startswith("another" if ahead == "here" else "out.log 1")


def test_the_remote_folder_is_not_the_runs_own(tmp_path):
    manifest = write_data(tmp_path / "data", (50,))
    for inside in (tmp_path / "logs", tmp_path / "logs" / "run" / "copy"):
        with pytest.raises(ConfigError, match=r"--remote-sync: .* is the run's own folder"):
            run(tmp_path, manifest, "--remote-sync", str(inside))
    assert not list(folder_of(tmp_path).glob("*.jsonl"))


def test_a_sharded_remote_checkpoint_has_its_logs_there_before_it_counts(tmp_path, monkeypatch):
    monkeypatch.setitem(fsspec.config.conf, "local", {"auto_mkdir": True})
    manifest, remote = write_data(tmp_path / "data", (200,)), f"local://{tmp_path}/copy"
    words = ["--checkpoint-format", "sharded-remote", "--remote-sync", remote, "--remote-sync-frequency", "3600"]
    counted = []
    from open_lm.checkpoint import commit as commits

    real = commits.publish

    def publish(folder, commit):
        rows = (tmp_path / "copy" / "run" / "metrics.jsonl").read_text().splitlines()
        counted.append((commit.step, max(json.loads(row)["step"] for row in rows)))
        real(folder, commit)

    monkeypatch.setattr(commits, "publish", publish)
    run(tmp_path, manifest, *words, "--num-checkpoints", "3", "--no-async-save")
    assert [step for step, _ in counted] == [4, 8, 12] and all(logged >= step for step, logged in counted)


# Requests


def test_requests_do_not_grow_with_the_checkpoints_that_are_kept(tmp_path, monkeypatch):
    """One listing for all sizes, and no commit file is read twice: as a save begins, and in a pass."""
    monkeypatch.setitem(fsspec.config.conf, "local", {"auto_mkdir": True})
    from fsspec.implementations.local import LocalFileSystem

    remote = f"local://{tmp_path}/copy"
    checkpoints = make_checkpoints(
        tmp_path / "disk", checkpoint_format="sharded-remote", remote_sync=remote, async_save=False
    )
    checkpoints.copy = f"{remote}/checkpoints"
    state, n_requests, made, inside = make_state(), [0], [], threading.local()

    def counted(real):
        """A method of the store, of which only the calls from outside count."""

        def request(*words, **options):
            if getattr(inside, "one", False):
                return real(*words, **options)
            inside.one, n_requests[0] = True, n_requests[0] + 1
            try:
                return real(*words, **options)
            finally:
                inside.one = False

        return request

    for name in ("info", "glob", "find", "exists", "put_file", "rm", "cat_file", "size"):
        monkeypatch.setattr(LocalFileSystem, name, counted(getattr(LocalFileSystem, name)))
    for k in range(1, 9):
        take_steps(state, 1)
        before = n_requests[0]
        assert checkpoints.save(state, NoData(), label=str(k), stats=STATS)
        made.append(n_requests[0] - before)
    assert max(made) <= made[1] + 1, made
    sync = RemoteSync(os.fspath(tmp_path / "disk"), remote, 300, checkpoints.retention)
    sync.sync()
    before = n_requests[0]
    sync.sync()
    assert n_requests[0] - before <= 5 and len(committed(checkpoints.copy)) == 8
