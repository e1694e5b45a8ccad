"""The scripts for several machines, on "machines" that are processes here: SLURM's programs are stood in for."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import ROOT, flags, folder_of, metrics, run, write_data

SRUN = """#!/bin/bash
# One process a task, as srun starts them; the signal SLURM sends before the time limit goes to every task.
[[ $1 == --kill-on-bad-exit=0 ]] && shift
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=0 "$@" & pids+=($!)
done
trap 'kill -USR1 "${pids[@]}"' USR1
echo "${pids[@]}" > "$FAKE/tasks"
code=0
for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2> /dev/null; do wait "$pid"; one=$?; done
    ((one > code)) && code=$one
done
exit "$code"
"""
SCONTROL = """#!/bin/bash
[[ $1 == show ]] && { echo 127.0.0.1; echo other-node; exit; }
echo "$@" >> "$FAKE/calls"
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(**further):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1", **further}


@pytest.fixture
def slurm(tmp_path):
    """The environment of a job of two tasks on two nodes."""
    fake = tmp_path / "fake"
    fake.mkdir()
    for name, body in (("srun", SRUN), ("scontrol", SCONTROL)):
        (fake / name).write_text(body)
        (fake / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2"}
    env = environment(**job, SLURM_JOB_NODELIST="node[1-2]", SLURM_SUBMIT_DIR=str(tmp_path), FAKE=str(fake))
    return {**env, "PATH": f"{fake}:{env['PATH']}"}


def test_a_job_saves_before_its_time_limit_requeues_itself_and_continues(tmp_path, slurm):
    command = ["bash", str(ROOT / "scripts" / "train.sbatch")]
    command += flags(tmp_path, write_data(tmp_path / "data"), "--fsdp", "--multiple-data-passes", steps=300)
    first = subprocess.Popen(command, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, tasks = folder_of(tmp_path) / "metrics.jsonl", Path(slurm["FAKE"]) / "tasks"
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not (log.exists() and len(log.read_text().splitlines()) > 3):
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.05)
    for pid in tasks.read_text().split():
        os.kill(int(pid), signal.SIGUSR1)
    out, err = first.communicate(timeout=100)
    assert first.returncode == 0, err
    assert "back into the queue" in out
    assert (Path(slurm["FAKE"]) / "calls").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    saved = max(metrics(tmp_path))
    assert 3 < saved < 300
    again = subprocess.run(command, env=slurm, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0, again.stderr
    assert "resumed from" in again.stderr
    assert max(metrics(tmp_path)) == 300
    assert (Path(slurm["FAKE"]) / "calls").read_text().count("requeue") == 1


def test_a_job_that_fails_is_not_requeued(tmp_path, slurm):
    command = ["bash", str(ROOT / "scripts" / "train.sbatch"), *flags(tmp_path, str(tmp_path / "missing.jsonl"))]
    done = subprocess.run(command, env=slurm, capture_output=True, text=True, timeout=100)
    assert done.returncode not in (0, 85)
    assert not (Path(slurm["FAKE"]) / "calls").exists()
    nameless = subprocess.run(command[:2], env=slurm, capture_output=True, text=True, timeout=100)
    assert nameless.returncode == 2 and "--name" in nameless.stderr


def test_two_machines_train_as_one_process_does(tmp_path):
    manifest, port = write_data(tmp_path / "data"), str(free_port())
    run(tmp_path, manifest, name="one")
    nodes = []
    for rank in ("0", "1"):
        node = {"NNODES": "2", "NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NPROC": "1"}
        command = [
            "bash",
            str(ROOT / "scripts" / "train_on_nodes.sh"),
            *flags(tmp_path, manifest, "--fsdp", name="two"),
        ]
        nodes.append(subprocess.Popen(command, env=environment(**node), stderr=subprocess.PIPE, text=True))
    for process in nodes:
        assert process.wait(timeout=100) == 0, process.communicate()[1]
    assert list(metrics(tmp_path, "two").values()) == pytest.approx(list(metrics(tmp_path, "one").values()), abs=1e-5)


@pytest.mark.parametrize("script", ["train.sbatch", "train_on_nodes.sh"])
def test_the_shell_can_read_the_script(script):
    assert subprocess.run(["bash", "-n", str(ROOT / "scripts" / script)]).returncode == 0
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", str(ROOT / "scripts" / script)]).returncode == 0
