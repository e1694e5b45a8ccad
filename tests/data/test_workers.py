"""Data workers that die, end early or outlive their parent: an error that says so, never a hang, never an orphan."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from open_lm.data.pipeline import StepSource, run_pipeline
from open_lm.data.rows import SampleRows
from open_lm.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]


def positions(step):
    return np.arange(4 * step, 4 * step + 4)


def alternating(places, n_workers):
    return places % n_workers


class Fill:
    """Gives samples until one position, then does what a test asks for."""

    def __init__(self, then):
        self.then = then

    def __call__(self, places):
        if 41 in places.tolist():
            self.then()
        return SampleRows(np.zeros((len(places), 3), np.int32) + places[:, None].astype(np.int32), [])


def run(then, n_workers=2, together=1):
    source = StepSource(positions, alternating, 0, 20)
    steps = run_pipeline(source, Fill(then), n_workers=n_workers, batch=4, together=together)
    return [step.tokens[:, 0].tolist() for step in steps]


def nothing():
    pass


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def leave():
    raise StopIteration


def expected_error():
    raise DataError("shard x, member y: is broken.")


def bug():
    raise KeyError("a bug")


@pytest.mark.parametrize("n_workers", [0, 1, 2, 3])
def test_steps_come_in_order_each_put_together_from_all_workers(n_workers):
    for together in (1, 3, 50):
        assert run(nothing, n_workers, together) == [list(range(4 * k, 4 * k + 4)) for k in range(20)]


def test_steps_handed_over_together_may_be_of_several_types():
    class Mixed(Fill):
        def __call__(self, places):
            rows = super().__call__(places)
            return rows if places[0] % 8 else rows._replace(tokens=rows.tokens.astype("<u2"))

    steps = run_pipeline(StepSource(positions, alternating, 0, 20), Mixed(nothing), n_workers=2, batch=4, together=4)
    assert [step.tokens[:, 0].tolist() for step in steps] == [list(range(4 * k, 4 * k + 4)) for k in range(20)]


def test_the_steps_before_an_error_are_not_lost_with_it():
    """The error stands in the same message as steps that are whole."""
    steps = run_pipeline(
        StepSource(positions, alternating, 0, 20), Fill(expected_error), n_workers=1, batch=4, together=8
    )
    assert [int(next(steps).tokens[0, 0]) for _ in range(10)] == list(range(0, 40, 4))
    with pytest.raises(DataError, match="is broken"):
        next(steps)


def test_a_killed_worker_is_an_error_that_names_the_step():
    with pytest.raises(DataError, match=r"--workers: a data worker failed at step \d+ \(.+\)"):
        run(die)


def test_a_worker_that_ends_early_is_noticed():
    with pytest.raises(DataError, match="--workers"):
        run(leave)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_an_expected_error_arrives_as_it_was_raised(n_workers):
    with pytest.raises(DataError, match=re.escape("shard x, member y: is broken.") + "$"):
        run(expected_error, n_workers)


def test_a_bug_keeps_its_traceback():
    with pytest.raises((KeyError, DataError)) as caught:
        run(bug)
    assert "in bug" in str(caught.value) or "in bug" in str(caught.value.__cause__)


def test_config_errors_keep_their_kind_too():
    def wrong():
        raise ConfigError("--vocab: no")

    with pytest.raises(ConfigError, match="--vocab: no"):
        run(wrong)


def test_workers_end_with_their_parent_however_that_ends():
    code = """
import sys, time; sys.path[:0] = ["ROOT", "HERE"]
import test_workers as t
def main():
    steps = t.run_pipeline(t.StepSource(t.positions, t.alternating, 0, 10**6), t.Fill(t.nothing), n_workers=2, batch=4)
    next(steps); print("ready", flush=True); time.sleep(60)
main()
"""
    code = code.replace("ROOT", str(ROOT)).replace("HERE", str(Path(__file__).parent))
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "ready\n"
    children = subprocess.run(["pgrep", "-P", str(parent.pid)], capture_output=True, text=True).stdout.split()
    parent.kill()
    parent.wait()
    assert len(children) >= 2
    for _ in range(100):
        if not any(alive(pid) for pid in children):
            return
        time.sleep(0.05)
    raise AssertionError(f"{children} live on")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
