"""One run at a time in a folder; a dead run's lock is taken over, and a run that lost its folder notices."""

import json
import os

import pytest

from open_lm.checkpoint import processes
from open_lm.errors import FolderLocked
from open_lm.run import lock as locks
from open_lm.run.lock import LOCK, FolderLock


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path):
    first, second = FolderLock(str(tmp_path)), FolderLock(str(tmp_path))
    first.acquire()
    with pytest.raises(FolderLocked, match="another run works in this folder"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_the_lock_of_a_dead_run_is_taken_over_and_the_dead_one_may_not_write(tmp_path, monkeypatch, host):
    monkeypatch.setattr(locks, "DEAD_AFTER_SECONDS", 0.3)
    first, second = FolderLock(str(tmp_path)), FolderLock(str(tmp_path))
    first.acquire()
    first._ended.set()  # it was stopped: no more signs of life
    owner = json.loads((tmp_path / LOCK).read_text()) | {"started": "another time"}
    (tmp_path / LOCK).write_text(json.dumps(owner | ({"host": "elsewhere"} if host == "elsewhere" else {})))
    second.acquire()
    second.require()
    with pytest.raises(FolderLocked, match="taken over"):
        first.require()
    first.release()
    assert (tmp_path / LOCK).exists()
    second.release()


def test_this_process_runs_and_one_of_another_start_time_does_not():
    me = processes.identity()
    assert processes.is_here(me) and processes.is_running(me)
    assert not processes.is_running(me | {"started": "another time"})
