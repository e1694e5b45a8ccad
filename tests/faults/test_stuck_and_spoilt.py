"""Ranks that are stuck, and numbers that are spoilt (rows 17, 18, 20, 21)."""

import json
import os
import signal

import pytest
from faults.scene import Scene, log_lines
from runs import metrics

from open_lm.checkpoint import manager
from open_lm.errors import DeviceError, TrainingDiverged


def test_a_stopped_rank_ends_the_others_with_stacks_and_collectives(scene):
    fault = {"event": "step", "rank": 1, "step": 8, "do": "stop"}
    with scene.start("--dist-timeout", "6", "--hang-timeout", "2", size=2, faults=[fault]) as ranks:
        ranks.wait_until(lambda: (scene.path().parent / "hang-rank0.json").exists())
        ranks.wait_until(lambda: _ended(ranks, 0))
        ranks.send(signal.SIGKILL, [1])
        assert ranks.wait()[0] == DeviceError.exit_code
    assert "all_reduce" in (scene.path().parent / "hang-rank0.txt").read_text()
    assert json.loads((scene.path().parent / "hang-rank0.json").read_text())["entries"]
    scene.resume(size=2)
    scene.require_as_straight(size=2)


def _ended(ranks, rank):
    pid, status = os.waitpid(ranks.pids[rank], os.WNOHANG)
    if pid:
        ranks.codes[rank] = os.waitstatus_to_exitcode(status)
    return ranks.codes[rank] is not None


@pytest.mark.parametrize("event", ["data", "load"])
def test_a_hang_outside_of_collectives_is_ended_by_the_watchdog(scene, event):
    """The stacks name what hangs."""
    scene.run("--stop-at-step", "6")
    fault = {"event": event, "do": "sleep:60", **({"step": 8} if event == "data" else {})}
    words = ["--resume", "latest", "--hang-timeout", "1" if event == "data" else "0.15"]
    codes, output = scene.run(*words, faults=[fault])
    assert codes == [DeviceError.exit_code], output
    stacks = (scene.path().parent / "hang-rank0.txt").read_text()
    assert {"data": "in timed", "load": "in restore"}[event] in stacks
    scene.resume()
    scene.require_as_straight()


@pytest.mark.parametrize(
    ("event", "factor", "step"), [("loss", "nan", 8), ("loss", "inf", 8), ("gradients", "nan", 11)]
)
def test_a_figure_that_is_not_finite_on_one_rank_ends_all_with_77(scene, event, factor, step):
    """No rank waits for another; what is saved is from before, also where only the gradients of the step that was to
    be saved are spoilt: its loss is good."""
    fault = {"event": event, "rank": 1, "step": step, "do": f"times:{factor}"}
    codes, output = scene.run(size=2, faults=[fault])
    assert codes == [TrainingDiverged.exit_code] * 2 and output.count("error: loss") == 1
    assert scene.steps() == [6]
    scene.resume(size=2)
    scene.require_as_straight(size=2)


@pytest.mark.slow
def test_a_spike_on_one_rank_is_skipped_on_all_and_the_batch_counts_as_used(scene):
    steps, spike = 90, 80
    fault = {"event": "loss", "rank": 1, "step": spike, "do": "times:100"}
    words = ["--skip-step-sigma", "6", "--multiple-data-passes"]
    codes, output = scene.run(*words, size=2, faults=[fault], steps=steps)
    assert codes == [0, 0], output
    skipped = [json.loads(line) for line in (scene.path().parent / "skipped_steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in skipped] == [spike + 1]
    assert max(list(metrics(scene.folder).values())[-5:]) < 2 and scene.steps()[-1] == steps
    assert {state["samples_consumed"] for state in scene.data_states()} >= {steps * 8}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["consolidated", "sharded"])
def test_a_rank_that_writes_or_reads_for_longer_than_the_timeout_is_waited_for(scene, kind):
    """A slow disk is no hang: what waits for files has no limit of --dist-timeout."""
    slow = {"rank": 0, "do": "sleep:10"}
    words = ["--checkpoint-format", kind, "--no-async-save", "--dist-timeout", "6", "--hang-timeout", "30"]
    codes, output = scene.run(*words, "--stop-at-step", "12", size=2, faults=[{"event": "file.sync", "nth": 2, **slow}])
    assert codes == [0, 0], output
    codes, output = scene.run(*words, "--resume", "latest", size=2, faults=[{"event": "read", **slow}])
    assert codes == [0, 0], output
    scene.require_as_straight(size=2)


def test_a_save_that_waits_for_a_dead_rank_keeps_no_other_rank_alive(scene, monkeypatch):
    """Rank 0 still writes, rank 2 waits for it in the same save, neither can be told: each leaves all the same."""
    scene = Scene(scene.folder, scene.manifest, {}, batch=12)
    monkeypatch.setattr(manager, "LAST_SECONDS", 0.5)
    log = scene.folder / "events"
    slow = {"event": "file.open", "path": "stats.pt", "rank": 0, "do": "sleep:60"}
    late = {"event": "step", "rank": 1, "step": 8, "do": "sleep:60"}
    with scene.start("--checkpoint-format", "sharded", size=3, faults=[slow, late], log=log) as ranks:
        ranks.wait_until(lambda: {line["rank"] for line in log_lines(log)} == {0, 1})
        ranks.send(signal.SIGKILL, [1])
        codes, output = ranks.wait(40), ranks.output()
    assert codes == [DeviceError.exit_code, -signal.SIGKILL, DeviceError.exit_code], output
    assert output.count("needs a rank that is gone") == 1 and output.count("lost contact") >= 2
    assert scene.steps() == []


def test_ranks_do_not_wait_a_day_for_one_that_dies_before_it_joins_them(scene):
    """The group for shards is made at the first save, and waits long only once all are in it."""
    dies = {"event": "load", "rank": 1, "do": "kill_in:new_group"}
    words = ["--checkpoint-format", "sharded", "--resume", "latest", "--dist-timeout", "4"]
    codes, output = scene.run(*words, size=2, faults=[dies], timeout=30)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None), output
