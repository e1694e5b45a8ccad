"""`openlm train --nproc-per-node N` starts the ranks itself: signals, exit codes, and the losses of torchrun."""

import os
import signal
import subprocess
import sys
import time

import pytest
from runs import ROOT, flags, metrics, run_command, write_data

from open_lm.commands.ranks import Ranks
from open_lm.commands.train import LaunchConfig, main
from open_lm.errors import ConfigError

MEMBERS = [{"RANK": "0"}, {"RANK": "1"}]
ON_SIGNAL = """
import os, signal, sys, time
def stop(number, frame):
    time.sleep(0.3 * int(os.environ["RANK"]))  # a rank may need longer to save
    open(sys.argv[1] + "/" + os.environ["RANK"], "a").write(signal.Signals(number).name + " ")
    sys.exit(85)
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
open(sys.argv[1] + "/ready" + os.environ["RANK"], "w")
time.sleep(60)
"""


def ranks(code, *words, grace=30.0):
    return Ranks([sys.executable, "-c", code, *map(str, words)], MEMBERS, grace)


def by_rank(first, second):
    return f"import os, sys, time, signal\nif os.environ['RANK'] == '0': {first}\nelse: {second}"


def test_all_ranks_that_end_well_give_0():
    assert ranks("pass").wait() == 0


def test_the_code_is_that_of_the_first_rank_that_failed():
    later = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(71)); time.sleep(60)"
    assert ranks(by_rank(later, "sys.exit(77)"), grace=0.3).wait() == 77


def test_a_rank_that_waits_for_a_failed_one_is_ended():
    began = time.monotonic()
    assert ranks(by_rank("time.sleep(60)", "sys.exit(66)"), grace=0.3).wait() == 66
    assert time.monotonic() - began < 55


def test_a_rank_that_does_not_listen_is_killed():
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    assert ranks(by_rank(deaf, "time.sleep(0.5); sys.exit(66)"), grace=0.3).wait() == 66


def test_a_killed_rank_is_named(capsys):
    assert ranks(by_rank("time.sleep(60)", "os.kill(os.getpid(), signal.SIGKILL)"), grace=0.3).wait() == 137
    assert "rank 1 was ended by SIGKILL, as the system does for lack of memory" in capsys.readouterr().err


def test_a_rank_that_saved_and_stopped_waits_for_the_others_without_limit(tmp_path):
    assert ranks(by_rank("time.sleep(1.5); sys.exit(85)", "sys.exit(85)"), grace=0.1).wait() == 85


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_rank_once(number, tmp_path):
    program = (
        f"import sys; from open_lm.commands.ranks import Ranks; "
        f"sys.exit(Ranks([sys.executable, '-c', {ON_SIGNAL!r}, {str(tmp_path)!r}], {MEMBERS!r}).wait())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    launcher = subprocess.Popen([sys.executable, "-c", program], env=environment, start_new_session=True)
    while not all((tmp_path / f"ready{k}").exists() for k in (0, 1)):
        time.sleep(0.05)
    os.killpg(launcher.pid, number)  # as a terminal does with Ctrl-C
    assert launcher.wait(90) == 85
    assert [(tmp_path / str(k)).read_text() for k in (0, 1)] == [f"{number.name} "] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nproc-per-node", "0"], "--nproc-per-node 0"),
        (["--nproc-per-node", "two"], "--nproc-per-node two"),
        (["--nproc-per-node", "2", "--nnodes", "2"], "--master-addr"),
        (["--nnodes", "2", "--master-addr", "10.0.0.1"], "--nproc-per-node"),
        (["--nproc-per-node", "1", "--node-rank", "1"], "--node-rank 1"),
        (["--nproc-per-node", "2", "--no-such-flag", "1"], "--no-such-flag"),
    ],
)
def test_wrong_flags_are_refused_before_a_rank_starts(words, message):
    with pytest.raises(ConfigError, match=message):
        main(words)


def test_every_rank_of_two_machines_has_its_number(monkeypatch):
    seen = {}

    class Recorded:
        def __init__(self, command, variables):
            seen.update(command=command, variables=variables)

        def wait(self):
            return 0

    monkeypatch.setattr("open_lm.commands.train.Ranks", Recorded)
    words = (
        "--nproc-per-node 2 --nnodes 2 --node-rank 1 --master-addr 10.0.0.1 --dataset-type synthetic --train-steps 1"
    )
    with pytest.raises(SystemExit, match="0"):
        main([*words.split(), "--logs", "x"])
    assert [(v["RANK"], v["LOCAL_RANK"], v["WORLD_SIZE"]) for v in seen["variables"]] == [
        ("2", "0", "4"),
        ("3", "1", "4"),
    ]
    assert {v["MASTER_ADDR"] + ":" + v["MASTER_PORT"] for v in seen["variables"]} == {"10.0.0.1:29500"}
    assert seen["command"][-2:] == ["--logs", "x"]


def test_none_means_this_process():
    assert LaunchConfig().nproc_per_node is None


def test_two_ranks_train_as_under_torchrun_and_logs_works(tmp_path):
    manifest = write_data(tmp_path / "data")
    words = flags(tmp_path, manifest, name="openlm", steps=3)
    words[words.index("--logs-dir")] = "--logs"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "open_lm", "train", "--nproc-per-node", "2", *words],
        capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "logs" / "openlm" / "out.log").read_text()
    assert "openlm train --nproc-per-node 2 --dataset-manifest" in log.splitlines()[0]
    theirs = run_command(flags(tmp_path, manifest, name="torchrun", steps=3), ranks=2)
    assert theirs.returncode == 0, theirs.stderr
    assert metrics(tmp_path, "openlm") == metrics(tmp_path, "torchrun")
