"""Run length: given in steps or tokens, cut short without changing the schedule, and by the clock."""

import pytest
import torch
from runs import SEQ_LEN, flags, folder_of, metrics, run, run_command, weights, write_data

from open_lm.errors import ConfigError


@pytest.fixture
def manifest(tmp_path):
    return write_data(tmp_path / "data")


@pytest.mark.parametrize("stop", [["--stop-at-step", "5"], ["--stop-at-tokens", str(5 * 8 * SEQ_LEN - 7)]])
def test_stopping_early_and_going_on_is_the_straight_run(tmp_path, manifest, stop):
    run(tmp_path, manifest, name="straight")
    stopped = run(tmp_path, manifest, *stop)
    assert stopped.step == 5
    assert (folder_of(tmp_path) / "checkpoints" / "epoch_0-step5.pt").exists()
    run(tmp_path, manifest, "--resume", "latest")
    assert metrics(tmp_path) == metrics(tmp_path, "straight")
    assert metrics(tmp_path, key="train/lr") == metrics(tmp_path, "straight", key="train/lr")
    assert all(torch.equal(w, weights(tmp_path, "straight")[name]) for name, w in weights(tmp_path).items())


def test_stopping_at_an_interval_end_keeps_its_name_and_more_data_than_needed_is_not_asked_for(tmp_path, manifest):
    stopped = run(tmp_path, manifest, "--num-checkpoints", "5", "--stop-at-step", "12", steps=20)  # 13 steps of data
    assert stopped.step == 12
    assert (folder_of(tmp_path) / "checkpoints" / "epoch_3.pt").exists()


def test_length_in_steps(tmp_path, manifest):
    arguments = [word for word in flags(tmp_path, manifest) if word != "--train-tokens"]
    del arguments[arguments.index(str(12 * 8 * SEQ_LEN))]
    from open_lm.main import main

    assert main([*arguments, "--train-steps", "7", "--num-checkpoints", "2"]).step == 7
    with pytest.raises(ConfigError, match="--train-steps excludes"):
        main([*arguments, "--train-steps", "7", "--train-tokens", "999"])


def test_a_time_limit_saves_and_ends_with_85_on_all_ranks_and_the_run_goes_on(tmp_path, manifest):
    arguments = flags(tmp_path, manifest, steps=4000)
    arguments += ["--multiple-data-passes", "--time-limit-minutes", "0.08"]
    ended = run_command(arguments, ranks=2)
    assert "exitcode  : 85" in ended.stderr, ended.stderr[-2000:]
    assert "stopped by --time-limit-minutes 0.08" in ended.stderr
    (saved,) = (folder_of(tmp_path) / "checkpoints").glob("epoch_0-step*.commit.json")
    assert max(metrics(tmp_path)) == int(saved.name.split("step")[1].split(".")[0])
