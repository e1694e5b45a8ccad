"""The samples of any step of a real run are found from its folder, however its batch was given and changed."""

import re

import pytest
import torch
from runs import flags, folder_of, run, run_command, write_data

from open_lm.data import loader
from open_lm.data.inspect import main
from open_lm.errors import ConfigError


def shown(capsys, folder, step, *more):
    capsys.readouterr()
    main(["--run", str(folder), "--step", str(step), "--tokens", "0", *more])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"step {step} row")]
    return [[int(token) for token in re.search(r"npy: (.*)", line)[1].split()] for line in lines]


def recorded(monkeypatch):
    """The tokens that the loader gave to training, by step."""
    seen, masked = {}, loader.Loader._masked

    def watch(self, read, step):
        seen[step] = read.tokens.tolist()
        return masked(self, read, step)

    monkeypatch.setattr(loader.Loader, "_masked", watch)
    return seen


def test_a_run_by_batch_size_per_process_that_skipped_steps_and_was_resumed(tmp_path, monkeypatch, capsys):
    seen, manifest = recorded(monkeypatch), write_data(tmp_path / "data")
    common = ["--batch-size", "4", "--num-checkpoints", "2", "--skip-steps", "2-3"]
    run(tmp_path, manifest, *common, steps=6)
    for name in ("epoch_2.pt", "optimizer_2.pt", "stats_2.pt", "epoch_2.commit.json"):
        (folder_of(tmp_path) / "checkpoints" / name).unlink()
    run(tmp_path, manifest, *common, "--resume", "latest", steps=6)
    assert sorted(seen) == list(range(12)) and {len(samples) for samples in seen.values()} == {4}
    for step, samples in seen.items():
        assert shown(capsys, folder_of(tmp_path), step) == samples, step


def test_two_processes_with_a_batch_each(tmp_path, capsys):
    manifest = write_data(tmp_path / "data")
    done = run_command(flags(tmp_path, manifest, "--batch-size", "2", steps=4, batch=4), ranks=2)
    assert done.returncode == 0, done.stderr
    rows = [shown(capsys, folder_of(tmp_path), step) for step in range(4)]
    assert [len(samples) for samples in rows] == [4] * 4
    for file in (folder_of(tmp_path) / "checkpoints").glob("stats_*"):
        state = torch.load(file, weights_only=True)["data_state"]
        assert state["samples_consumed"] == 16
        file.unlink()
    with pytest.raises(ConfigError, match="--global-batch-size"):
        shown(capsys, folder_of(tmp_path), 0)
    assert [shown(capsys, folder_of(tmp_path), step, "--global-batch-size", "4") for step in range(4)] == rows
