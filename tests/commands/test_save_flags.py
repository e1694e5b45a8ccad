"""The flags that say when checkpoints are written and which stay, in whole runs."""

import signal

import pytest
from runs import flags, folder_of, metrics, run, run_command, weights, write_data

from open_lm.checkpoint import commit as commits
from open_lm.checkpoint.manager import Checkpoints
from open_lm.errors import Preempted


@pytest.fixture
def manifest(tmp_path):
    return write_data(tmp_path / "data", (200,))


def checkpoints_of(tmp_path, name="run"):
    """`{label: step}` of the checkpoints that exist."""
    return {c.label: c.step for c in commits.committed(str(folder_of(tmp_path, name) / "checkpoints"))}


def test_all_kinds_live_together(tmp_path, manifest):
    extra = ["--num-checkpoints", "2", "--save-every-steps", "4", "--save-at-steps", "1,5"]
    run(tmp_path, manifest, *extra, "--ephemeral-every-steps", "3", "--keep-last", "1")
    assert checkpoints_of(tmp_path) == {"0-step1": 1, "0-step5": 5, "1-step8": 8, "2": 12}
    names = {path.name.split(".")[0] for path in (folder_of(tmp_path) / "checkpoints").glob("epoch*")}
    assert names == {"epoch_0-step1", "epoch_0-step5", "epoch_1-step8", "epoch_2"}  # no file of the others is left


def test_a_run_continues_bit_equal_from_inside_an_interval(tmp_path, manifest):
    run(tmp_path, manifest, name="straight")
    extra = ["--save-every-steps", "5"]
    run(tmp_path, manifest, *extra)
    for label in ("1", "0-step10"):
        for path in (folder_of(tmp_path) / "checkpoints").glob(f"*_{label}.*"):
            path.unlink()
    run(tmp_path, manifest, *extra, "--resume", "latest")
    assert metrics(tmp_path) == metrics(tmp_path, "straight")
    assert all((weights(tmp_path)[k] == v).all() for k, v in weights(tmp_path, "straight").items())


def test_a_stop_leaves_an_ephemeral_checkpoint_that_the_next_one_replaces(tmp_path, manifest, monkeypatch):
    real = Checkpoints.save

    def stopping(self, state, *args, **kwargs):
        done = real(self, state, *args, **kwargs)
        if state.step == 4:
            signal.raise_signal(signal.SIGTERM)
        return done

    monkeypatch.setattr(Checkpoints, "save", stopping)
    extra = ["--ephemeral-every-steps", "4", "--keep-last", "1"]
    with pytest.raises(Preempted):
        run(tmp_path, manifest, *extra)
    assert checkpoints_of(tmp_path) == {"0-step4": 4}
    run(tmp_path, manifest, *extra, "--resume", "latest")
    assert checkpoints_of(tmp_path) == {"1": 12}


def test_ranks_decide_together_that_time_is_up(tmp_path, manifest):
    arguments = flags(tmp_path, manifest, "--save-every-minutes", "1e-9", steps=3)
    done = run_command(arguments, ranks=2)
    assert done.returncode == 0, done.stderr
    assert checkpoints_of(tmp_path) == {"0-step1": 1, "0-step2": 2, "1": 3}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_before_the_first_step_changes_nothing_and_can_be_resumed(tmp_path, manifest, optimizer):
    extra = ["--optimizer", optimizer]
    run(tmp_path, manifest, *extra, name="straight")
    fixed = ["--save-at-steps", "0,5", "--keep-last", "1", *extra]
    evaluated = ["--val-data", manifest, "--eval-at-steps", "0", "5"]
    run(tmp_path, manifest, *fixed, *evaluated)
    assert checkpoints_of(tmp_path) == {"0": 0, "0-step5": 5, "1": 12}
    losses = metrics(tmp_path, key="valid/loss")
    assert sorted(losses) == [0, 5, 12]
    assert losses[0] > losses[5] > losses[12]
    for label in ("1", "0-step5"):
        for path in (folder_of(tmp_path) / "checkpoints").glob(f"*_{label}.*"):
            path.unlink()
    run(tmp_path, manifest, *fixed, "--resume", "latest")
    assert checkpoints_of(tmp_path) == {"0": 0, "0-step5": 5, "1": 12}
    assert all((weights(tmp_path)[k] == v).all() for k, v in weights(tmp_path, "straight").items())
