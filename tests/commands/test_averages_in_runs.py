"""Averages and the guard of a run survive a stop, at any number of ranks, and averages load like weights."""

import json

import pytest
import torch
from runs import flags, folder_of, metrics, run, run_command, weights, write_data

import open_lm

NAMES = "ema_0.9_1,poly_8_2,cosine_5_1"


@pytest.fixture
def manifest(tmp_path):
    return write_data(tmp_path / "data")


def average(tmp_path, kind, name="run", label="1"):
    path = folder_of(tmp_path, name) / "checkpoints" / f"{kind}_{label}.pt"
    return torch.load(path, weights_only=True)["state_dict"]


def same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], **(tolerance or {"rtol": 0, "atol": 0}))


def test_averages_of_a_stopped_run_are_those_of_the_straight_one(tmp_path, manifest):
    extra = ["--averagers", NAMES, "--log-avg-model-training-loss", "4"]
    run(tmp_path, manifest, *extra, name="straight")
    run(tmp_path, manifest, *extra, "--stop-at-step", "5")
    run(tmp_path, manifest, *extra, "--resume", "latest")
    for kind in NAMES.split(","):
        same(average(tmp_path, kind), average(tmp_path, kind, "straight"))
        losses = metrics(tmp_path, key=f"train/{kind}_loss")
        assert list(losses) == [4, 8, 12] and losses == metrics(tmp_path, "straight", f"train/{kind}_loss")


def test_averages_are_the_same_on_sharded_ranks_and_load_like_weights(tmp_path, manifest):
    run(tmp_path, manifest, "--averagers", NAMES, name="one")
    arguments = [*flags(tmp_path, manifest), "--averagers", NAMES, "--fsdp"]
    assert run_command([*arguments, "--stop-at-step", "5"], ranks=2).returncode == 0
    done = run_command([*arguments, "--resume", "latest"], ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    for kind in NAMES.split(","):
        same(average(tmp_path, kind), average(tmp_path, kind, "one"), rtol=1e-4, atol=1e-5)
    model = open_lm.load_model(folder_of(tmp_path) / "checkpoints" / "ema_0.9_1_1.pt")
    same(dict(model.state_dict()), average(tmp_path, "ema_0.9_1"))
    assert not torch.equal(weights(tmp_path)["output.weight"], average(tmp_path, "ema_0.9_1")["output.weight"])


def test_an_average_that_was_not_kept_before_begins_at_the_resume(tmp_path, manifest):
    run(tmp_path, manifest, "--stop-at-step", "12")
    resumed = run(tmp_path, manifest, "--averagers", "poly_0_1", "--resume", "latest", steps=13)
    assert resumed.step == 13
    label = sorted(p.name for p in (folder_of(tmp_path) / "checkpoints").glob("poly_0_1_*.pt"))[-1]
    label = label.removeprefix("poly_0_1_").removesuffix(".pt")
    same(average(tmp_path, "poly_0_1", label=label), weights(tmp_path, label=label))


def test_spikes_are_left_out_written_down_and_the_same_after_a_stop(tmp_path):
    manifest = write_data(tmp_path / "data", counts=(300, 500))
    extra = ["--skip-step-sigma", "1.0", "--lr", "1e-5"]  # nothing is learnt: the losses are noise
    run(tmp_path, manifest, *extra, name="straight", steps=90)
    run(tmp_path, manifest, *extra, "--stop-at-step", "75", steps=90)
    run(tmp_path, manifest, *extra, "--resume", "latest", steps=90)
    same(weights(tmp_path), weights(tmp_path, "straight"))
    lines = [(folder_of(tmp_path, n) / "skipped_steps.jsonl").read_text().splitlines() for n in ("run", "straight")]
    assert lines[0] == lines[1] and lines[0]
    assert all(json.loads(line)["step"] > 64 for line in lines[0])
