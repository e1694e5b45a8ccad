"""A checkpoint exists if and only if its commit file does and every file is as it was written."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from open_lm import storage
from open_lm.checkpoint import commit as commits
from open_lm.checkpoint.commit import Commit
from open_lm.checkpoint.resolve import newest_in
from open_lm.checkpoint.retention import discard
from open_lm.errors import CheckpointError, StorageError


def write(folder, label, step):
    payload = {"state_dict": {"w": torch.full((64,), float(step))}}
    files = {f"epoch_{label}.pt": commits.save_file(str(folder), f"epoch_{label}.pt", payload)}
    files[f"stats_{label}.pt"] = commits.save_file(str(folder), f"stats_{label}.pt", {"step": step})
    commits.publish(str(folder), Commit(label, step, files, {"name": "run"}))


def test_files_hold_what_was_saved_and_the_commit_their_size_and_hash(tmp_path):
    write(tmp_path, "1", 10)
    (found,) = commits.committed(str(tmp_path))
    assert (found.label, found.step) == ("1", 10)
    assert torch.load(tmp_path / "epoch_1.pt")["state_dict"]["w"][0] == 10
    assert found.files["epoch_1.pt"].size_bytes == (tmp_path / "epoch_1.pt").stat().st_size
    assert commits.damaged_file(str(tmp_path), found) is None


def test_latest_is_the_newest_step_whatever_the_labels_or_times(tmp_path):
    for label, step in (("2", 20), ("10", 100), ("9", 90), ("9-step95", 95)):
        write(tmp_path, label, step)
    os.utime(tmp_path / "epoch_2.commit.json", (2**31, 2**31))
    assert newest_in(str(tmp_path)).path == str(tmp_path / "epoch_10.pt")


def test_latest_looks_into_the_checkpoints_of_a_run_folder(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert newest_in(str(tmp_path)) is None
    write(tmp_path / "checkpoints", "1", 5)
    assert newest_in(str(tmp_path)).path == str(tmp_path / "checkpoints" / "epoch_1.pt")


@pytest.mark.parametrize("name", ["epoch_2.pt", "stats_2.pt"])
@pytest.mark.parametrize("damage", ["truncate", "remove", "flip"])
def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path, caplog, name, damage):
    write(tmp_path, "1", 10)
    write(tmp_path, "2", 20)
    file = tmp_path / name
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        content[len(content) // 2] ^= 0x10
        file.write_bytes(content[:-1] if damage == "truncate" else content)
    assert newest_in(str(tmp_path), "all").commit.label == "1"
    assert name in caplog.text


@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_flipped_bit_is_found(tmp_path, position, bit):
    write(tmp_path, "1", 10)
    file = tmp_path / "epoch_1.pt"
    content = bytearray(file.read_bytes())
    content[int(position * len(content))] ^= 1 << bit
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="all 1 checkpoints are damaged"):
        newest_in(str(tmp_path), "all")


def test_a_cut_commit_file_does_not_count(tmp_path, caplog):
    write(tmp_path, "1", 10)
    write(tmp_path, "2", 20)
    commit = tmp_path / "epoch_2.commit.json"
    commit.write_text(commit.read_text()[:40])
    assert newest_in(str(tmp_path), "all").commit.label == "1"
    assert "epoch_2.commit.json is damaged" in caplog.text


def test_a_checkpoint_that_is_deleted_while_the_folder_is_read_does_not_count(tmp_path, monkeypatch):
    write(tmp_path, "1", 10)
    write(tmp_path, "2", 20)
    listed = storage.glob_in(str(tmp_path), commits.COMMIT_PATTERN)
    discard(str(tmp_path), commits.committed(str(tmp_path))[0])
    monkeypatch.setattr(storage, "glob_in", lambda *_: listed)
    assert [commit.label for commit in commits.committed(str(tmp_path))] == ["1"]


def test_files_without_a_commit_do_not_count(tmp_path):
    torch.save({}, tmp_path / "epoch_7.pt")
    assert newest_in(str(tmp_path)) is None


def test_discarding_removes_all_files(tmp_path):
    write(tmp_path, "1", 10)
    discard(str(tmp_path), commits.committed(str(tmp_path))[0])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_file(tmp_path):
    code = f"""
        import resource, signal, torch
        from open_lm.checkpoint.commit import save_file
        from open_lm.errors import StorageError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_file({str(tmp_path)!r}, "epoch_1.pt", torch.zeros(1 << 20))
        except (StorageError, RuntimeError) as error:
            print("refused:", error)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=Path.cwd())
    assert "refused:" in run.stdout, run.stderr
    assert not list(tmp_path.iterdir())


def test_an_unwritable_folder_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StorageError, match=str(blocked)):
        commits.save_file(str(blocked), "epoch_1.pt", {})
