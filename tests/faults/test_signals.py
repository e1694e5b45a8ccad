"""Signals: to torchrun, to one rank, twice, while a save, a validation or a restore goes on (rows 11 to 16)."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from faults.scene import log_lines
from runs import ROOT

from open_lm.checkpoint.commit import committed, damaged_file

PREEMPTED = 85


@pytest.mark.parametrize("ranks", [[0], [1]])
def test_a_signal_to_one_rank_lets_all_save_the_same_step(scene, ranks):
    fault = {"event": "step", "rank": ranks[0], "step": 8, "do": "term"}
    codes, _ = scene.run(size=2, faults=[fault])
    assert codes == [PREEMPTED] * 2
    assert scene.steps() == [6, 9]  # the step in which it came is the last
    scene.resume(size=2)
    scene.require_as_straight(size=2)


@pytest.mark.parametrize(
    ("event", "step", "saved"),
    [("file.write", 11, [6, 12]), ("validation", None, [6]), ("gradients", 3, [4]), ("data", 3, [5])],
)
def test_a_signal_at_any_moment_leaves_one_complete_checkpoint(scene, event, step, saved):
    """In a save, in a validation, in a step, in the wait for data; each time twice."""
    held_out = ["--val-data", str(scene.manifest).replace("manifest.jsonl", "00000000.tar"), "--val-batch-size", "8"]
    faults = [{"event": event, "do": "term", **({"step": step} if step else {})}] * 2
    codes, output = scene.run(*held_out, "--no-async-save", faults=faults)
    assert codes == [PREEMPTED], output
    assert scene.steps() == saved
    scene.require_clean()
    scene.resume(*held_out)
    scene.require_as_straight()


def test_a_signal_while_a_checkpoint_is_read_loses_nothing(scene):
    scene.run("--stop-at-step", "6")
    codes, _ = scene.run("--resume", "latest", size=2, faults=[{"event": "load", "do": "term"}])
    assert set(codes) <= {-signal.SIGTERM, PREEMPTED, 71} and scene.steps() == [6]
    scene.resume()
    scene.require_as_straight()


def test_a_save_that_is_killed_for_taking_longer_than_the_grace_leaves_the_one_before(scene):
    faults = [{"event": "step", "step": 8, "do": "term"}, {"event": "save", "step": 8, "do": "sleep:60"}]
    with scene.start(faults=faults, log=scene.folder / "log") as ranks:
        ranks.wait_until(lambda: (scene.folder / "log").exists() and "sleep" in (scene.folder / "log").read_text())
        time.sleep(0.5)
        ranks.kill()  # as torchrun does after --shutdown-timeout
        assert ranks.wait() == [-signal.SIGKILL]
    assert scene.steps() == [6]
    scene.resume()
    scene.require_as_straight()


def torchrun(scene, *words, faults="[]", extra=()):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words, "-m"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": "1"}
    environment |= {"OPENLM_FAULTS": "faults.injector:at", "OPENLM_FAULT_PLAN": faults}
    endless = scene.words("--multiple-data-passes", *extra, steps=100_000)
    running = subprocess.Popen(
        [*launcher, "open_lm.main", *endless], stderr=subprocess.PIPE, text=True, env=environment
    )
    metrics = scene.path().parent / "metrics.jsonl"
    while not metrics.exists() or metrics.stat().st_size < 100:
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.1)
    return running


def ranks_left(scene, seconds):
    deadline = time.monotonic() + seconds
    while left := subprocess.run(["pgrep", "-f", str(scene.folder)], capture_output=True, text=True).stdout.split():
        if time.monotonic() > deadline:
            return left
        time.sleep(0.1)
    return []


def test_signals_while_the_last_copies_go_end_none_of_them(scene):
    """As SLURM sends SIGUSR1 ten minutes before its limit, and SIGTERM at it."""
    there = scene.folder / "remote"
    slow = {"event": "upload", "path": "epoch_4.pt", "do": "sleep:1"}
    log = scene.folder / "log"
    words = ["--remote-sync", there, "--remote-sync-frequency", "3600"]
    with scene.start(*words, faults=[slow], log=log) as ranks:
        ranks.wait_until(lambda: log_lines(log))
        for number in (signal.SIGUSR1, signal.SIGTERM):
            ranks.send(number)
        assert ranks.wait() == [0], ranks.output()
    assert [commit.step for commit in committed(str(there / "run" / "checkpoints"))] == [24, 18, 12, 6]


def test_ranks_that_end_by_the_third_failed_save_wait_for_the_last_copy(scene):
    there = scene.folder / "remote" / "run" / "checkpoints"
    full = {"event": "save", "nth": 2, "always": True, "do": "full"}
    slow = {"event": "upload", "path": "epoch_1.pt", "do": "sleep:1"}
    words = ["--remote-sync", scene.folder / "remote", "--remote-sync-frequency", "3600", "--no-async-save"]
    with scene.start(*words, size=2, faults=[full, slow]) as ranks:
        ranks.wait_until(lambda: os.waitid(os.P_PID, ranks.pids[1], os.WEXITED | os.WNOHANG | os.WNOWAIT))
        assert [commit.step for commit in committed(str(there))] == [6]
        assert ranks.wait() == [74, 74]


@pytest.mark.parametrize(
    ("fault", "code"), [({"do": "term", "step": 5}, PREEMPTED), ({"do": "times:nan", "step": 6}, 77)]
)
def test_a_run_that_ends_while_a_long_save_is_on_its_way_waits_for_it(scene, fault, code):
    """Longer than a step may take, and less than what is granted to a save."""
    slow = {"event": "file.sync", "path": "epoch_1.pt", "do": "sleep:3"}
    codes, output = scene.run("--hang-timeout", "1", faults=[slow, {"event": "loss", **fault}])
    assert codes == [code], output
    assert scene.steps() == [6]


def test_a_save_that_failed_once_is_made_again_as_what_it_was_when_the_run_stops_there(scene):
    """Not as one that goes when the next is there."""
    faults = [{"event": "file.write", "step": 5, "do": "full"}, {"event": "loss", "step": 5, "do": "term"}]
    codes, output = scene.run(faults=faults)
    assert codes == [PREEMPTED] and "was not written" in output
    scene.resume()
    assert scene.steps() == [6, 12, 18, 24]


def test_a_signal_in_the_last_step_leaves_out_the_evaluation_that_is_due_and_exits_as_stopped(scene):
    """The run is trained and saved; what is left is done when it starts again."""
    held_out = ["--val-data", str(scene.manifest).replace("manifest.jsonl", "00000000.tar"), "--val-batch-size", "8"]
    last = ["--val-frequency", "0"]
    codes, output = scene.run(*held_out, *last, faults=[{"event": "step", "step": 23, "do": "term"}])
    assert codes == [PREEMPTED], output
    assert scene.steps() == [6, 12, 18, 24]
    assert "validation" in scene.resume(*held_out, *last)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGTERM, []),
        (signal.SIGUSR1, ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"]),
        (signal.SIGUSR1, []),
        (signal.SIGKILL, []),
    ],
    ids=["SIGTERM", "SIGUSR1 forwarded", "SIGUSR1", "SIGKILL"],
)
def test_a_signal_to_torchrun_ends_with_a_checkpoint_and_no_orphan(scene, number, words):
    """torchrun forwards SIGTERM; SIGUSR1 and SIGKILL end it, and its ranks get SIGTERM from the system."""
    running = torchrun(scene, *words)
    try:
        running.send_signal(number)
        running.wait(60)
        assert ranks_left(scene, 30) == []
    finally:
        running.kill()
        running.stderr.close()
    assert len(scene.steps()) == 1 and scene.commits()[0].facts["kind"] == "ephemeral"


@pytest.mark.slow
def test_what_is_saved_on_preemption_under_torchrun_reaches_a_slow_remote(scene):
    """torchrun ends the other ranks once one has left: none leaves before the copy is there."""
    slow = json.dumps([{"event": "upload", "path": "optimizer", "do": "sleep:3", "always": True}])
    copy = scene.folder / "remote"
    running = torchrun(scene, faults=slow, extra=["--remote-sync", str(copy), "--remote-sync-frequency", "600"])
    try:
        running.send_signal(signal.SIGTERM)
        running.wait(60)
        assert ranks_left(scene, 30) == []
    finally:
        running.kill()
        running.stderr.close()
    there = str(copy / "run" / "checkpoints")
    assert [c.identity for c in committed(there)] == [c.identity for c in scene.commits()]
    assert scene.steps() and all(damaged_file(there, commit) is None for commit in committed(there))
