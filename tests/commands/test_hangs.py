"""A rank that is stuck leaves the stacks of all ranks in the run folder, and the run ends."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from runs import ROOT, flags, folder_of, write_data

STUCK = """
import os, sys, time
from open_lm import main as program
from open_lm.command import run

def stop_for_ever():
    time.sleep(600)

def stuck_step(state, *arguments, **options):
    if os.environ["RANK"] == "1" and state.step == 3:
        stop_for_ever()
    return real(state, *arguments, **options)

import open_lm.train.loop as loop
real, loop.train_step = loop.train_step, stuck_step
run(lambda: program.main(sys.argv[1:]))
"""


@pytest.fixture
def command(tmp_path):
    manifest = write_data(tmp_path / "data")
    (tmp_path / "stuck.py").write_text(STUCK)
    arguments = flags(tmp_path, manifest, "--dist-timeout", "15", "--hang-timeout", "5")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [*launcher, str(tmp_path / "stuck.py"), *arguments]


def test_a_stuck_rank_leaves_the_stacks_and_collectives_of_all_ranks(tmp_path, command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert ended.returncode != 0 and time.monotonic() - began < 90
    stacks = [(folder_of(tmp_path) / f"hang-rank{rank}.txt").read_text() for rank in (0, 1)]
    assert "all_reduce" in stacks[0] and "stop_for_ever" not in stacks[0]
    assert "stop_for_ever" in stacks[1]
    for rank in (0, 1):
        assert json.loads((folder_of(tmp_path) / f"hang-rank{rank}.json").read_text())["entries"]
    assert "no step ended in 5 s" in ended.stderr


def test_a_healthy_run_leaves_no_such_files(tmp_path, command):
    from open_lm.main import main

    main(command[command.index(str(tmp_path / "stuck.py")) + 1 :])
    assert not list(folder_of(tmp_path).glob("hang-*"))


def test_anybody_can_look_into_a_run_that_goes_on(tmp_path):
    arguments = flags(tmp_path, write_data(tmp_path / "data"), "--multiple-data-passes", steps=100_000)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "open_lm.main", *arguments]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        metrics = folder_of(tmp_path) / "metrics.jsonl"
        while not metrics.exists() or metrics.stat().st_size < 100:
            assert running.poll() is None
            time.sleep(0.2)
        shown = subprocess.run(
            ["bash", str(ROOT / "scripts" / "stacks.sh"), str(running.pid)], capture_output=True, text=True, timeout=60
        )
        if "Permission denied" in shown.stderr:
            pytest.skip("py-spy may not trace processes here")
        assert "train (open_lm/train/loop.py" in shown.stdout, shown.stderr
        running.send_signal(signal.SIGUSR2)
        running.send_signal(signal.SIGTERM)
        assert "train/loop.py" in running.communicate(timeout=60)[1]
        assert running.returncode == 85
    finally:
        running.kill()


def test_a_killed_launcher_leaves_no_rank_behind_and_a_checkpoint(tmp_path):
    arguments = flags(tmp_path, write_data(tmp_path / "data"), "--multiple-data-passes", steps=100_000)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    running = subprocess.Popen([*launcher, "open_lm.main", *arguments], stderr=subprocess.DEVNULL, env=environment)
    metrics = folder_of(tmp_path) / "metrics.jsonl"
    while not metrics.exists() or metrics.stat().st_size < 100:
        assert running.poll() is None
        time.sleep(0.2)
    running.kill()
    running.wait()
    deadline = time.monotonic() + 60
    while ranks := subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout.split():
        assert time.monotonic() < deadline, f"ranks {ranks} are still there"
        time.sleep(0.2)
    assert list((folder_of(tmp_path) / "checkpoints").glob("epoch_0-step*.commit.json"))
