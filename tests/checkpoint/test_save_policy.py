"""Saving and retention of checkpoints: tables worked by hand, and what holds for any flags."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_lm.checkpoint.commit import Commit
from open_lm.checkpoint.config import CheckpointConfig
from open_lm.checkpoint.save_policy import SaveClock, SaveSteps, kind_of, to_delete
from open_lm.errors import ConfigError

FLAGS = CheckpointConfig(save_every_steps=4, save_at_steps=("5,8", "13"), ephemeral_every_steps=3)


def test_what_is_due_at_each_step():
    steps = SaveSteps(FLAGS, (10, 20), 20)
    due = {step: kind for step in range(1, 21) if (kind := steps.kind_at(step))}
    assert due == {
        3: "ephemeral", 4: "step", 5: "fixed", 6: "ephemeral", 8: "fixed", 9: "ephemeral", 10: "interval", 12: "step",
        13: "fixed", 15: "ephemeral", 16: "step", 18: "ephemeral", 20: "interval",
    }  # fmt: skip
    assert steps.all() == [4, 5, 8, 10, 12, 13, 16, 20]
    assert [steps.label(step) for step in (4, 10, 13, 20)] == ["0-step4", "1", "1-step13", "2"]


def test_openlms_flags():
    steps = SaveSteps(CheckpointConfig(save_frequency=2, save_most_recent=True), (5, 10, 15), 15)
    assert [steps.kind_at(step) for step in (4, 5, 10, 15)] == [None, "ephemeral", "interval", "interval"]
    only_last = SaveSteps(CheckpointConfig(save_frequency=0), (5, 10), 10)
    assert only_last.all() == [10]
    stopped = SaveSteps(CheckpointConfig(), (5, 10), 7)
    assert stopped.all() == [5, 7] and stopped.label(7) == "1-step7"


def test_time_makes_a_checkpoint_due_between_intervals_only_when_it_is_up():
    steps = SaveSteps(CheckpointConfig(save_every_minutes=5), (10, 20), 20)
    assert steps.kind_at(7, time_is_up=True) == "step"
    assert steps.kind_at(7) is None
    assert steps.kind_at(10, time_is_up=True) == "interval"


def test_the_clock_runs_from_the_last_checkpoint(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = SaveClock(2)
    now[0] = 119
    assert not clock.is_up()
    now[0] = 120
    assert clock.is_up()
    clock.restart()
    assert not clock.is_up()
    assert not SaveClock(None).runs


@pytest.mark.parametrize("words", [("5,x",), ("-3",)])
def test_steps_that_are_no_steps_are_refused(words):
    with pytest.raises(ConfigError, match="--save-at-steps"):
        CheckpointConfig(save_at_steps=words)


def commit(step, kind):
    return Commit(f"0-step{step}", step, {}, {"kind": kind})


def test_each_kind_is_counted_by_itself_and_ephemeral_ones_never():
    kinds = {1: "interval", 2: "step", 3: "fixed", 4: "ephemeral", 5: "step", 6: "interval", 7: "step", 8: "ephemeral"}
    complete = [commit(step, kind) for step, kind in kinds.items()]
    going = to_delete(complete, commit(8, "ephemeral"), 1)
    assert sorted(c.step for c in going) == [1, 2, 4, 5]
    assert sorted(c.step for c in to_delete(complete, commit(8, "ephemeral"), None)) == [4]
    assert not to_delete(complete, commit(9, "interval"), 1)  # not on disk: nothing goes because of it


@given(st.lists(st.sampled_from(["interval", "step", "fixed", "ephemeral"]), min_size=1), st.integers(1, 4))
def test_the_newest_stays_fixed_ones_stay_and_as_many_as_asked_stay(kinds, n_kept):
    complete = [commit(step, kind) for step, kind in enumerate(kinds, 1)]
    newest = complete[-1]
    left = [c for c in complete if c not in to_delete(complete, newest, n_kept)]
    assert newest in left
    assert [c for c in complete if kind_of(c) == "fixed"] == [c for c in left if kind_of(c) == "fixed"]
    assert all(c is newest for c in left if kind_of(c) == "ephemeral")
    for kind in ("interval", "step"):
        alike = [c for c in complete if kind_of(c) == kind]
        assert [c for c in left if kind_of(c) == kind] == alike[-n_kept:]


def test_commits_of_before_kinds_were_written():
    assert kind_of(Commit("3", 3, {}, {"kept": True})) == "interval"
    assert kind_of(Commit("3-step9", 9, {}, {})) == "step"
    assert kind_of(Commit("3-step9", 9, {}, {"kept": False})) == "ephemeral"
    assert json.dumps(Commit("3", 3, {}, {"kind": "fixed"}).facts)
