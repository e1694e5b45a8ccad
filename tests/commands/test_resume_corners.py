"""Checkpoints in real life: extended runs, going back, other flags, full disks, kills."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from runs import ROOT, SEQ_LEN, flags, folder_of, metrics, run, run_command, weights, write_data

from open_lm.checkpoint import commit as commits
from open_lm.checkpoint.resolve import newest_in
from open_lm.errors import CheckpointError, ConfigError, StorageError, TrainingDiverged
from open_lm.main import main


@pytest.fixture
def manifest(tmp_path):
    return write_data(tmp_path / "data", (200,))


def checkpoints_of(tmp_path, name="run"):
    """`{label: step}` of the checkpoints that exist."""
    return {c.label: c.step for c in commits.committed(str(folder_of(tmp_path, name) / "checkpoints"))}


def test_extending_a_run_never_writes_over_its_last_checkpoint(tmp_path, manifest):
    run(tmp_path, manifest, steps=6)
    run(tmp_path, manifest, "--resume", "latest", steps=12)
    assert checkpoints_of(tmp_path) == {"1": 6, "1-step12": 12}
    run(tmp_path, manifest, name="straight", steps=12)
    assert metrics(tmp_path)[12] < metrics(tmp_path)[6]


def test_a_full_disk_while_extending_leaves_the_old_checkpoint(tmp_path, manifest, monkeypatch):
    run(tmp_path, manifest, steps=6)

    def full(*_):
        raise StorageError("no space left.")

    monkeypatch.setattr(commits, "save_file", full)
    with pytest.raises(StorageError, match="no space left"):
        run(tmp_path, manifest, "--resume", "latest", steps=12)
    assert checkpoints_of(tmp_path) == {"1": 6}
    assert newest_in(str(folder_of(tmp_path)), "all")


@pytest.mark.parametrize("point", ["save_file 1", "save_file 2", "save_file 3", "publish 1"])
def test_a_kill_at_any_point_of_a_save_leaves_the_previous_checkpoint(tmp_path, manifest, point):
    name, count = point.split()
    code = (
        "import os, sys; from open_lm.checkpoint import commit; from open_lm.main import main\n"
        f"real, calls = commit.{name}, [0]\n"
        "def dying(*a):\n"
        "    calls[0] += 1\n"
        f"    if calls[0] == {int(count) + (3 if name == 'save_file' else 1)}: os._exit(9)\n"  # in the second save
        "    return real(*a)\n"
        f"commit.{name} = dying\n"
        "main(sys.argv[1:])"
    )
    arguments = flags(tmp_path, manifest, "--num-checkpoints", "2", "--resume", "latest")
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 9
    assert checkpoints_of(tmp_path) == {"1": 6}
    main(arguments)
    assert checkpoints_of(tmp_path) == {"1": 6, "2": 12}
    run(tmp_path, manifest, "--num-checkpoints", "2", name="straight")
    assert metrics(tmp_path) == metrics(tmp_path, "straight")
    assert not list((folder_of(tmp_path) / "checkpoints").glob(".*"))


def test_going_back_leaves_later_checkpoints_behind(tmp_path, manifest):
    run(tmp_path, manifest, "--num-checkpoints", "4")
    path = str(folder_of(tmp_path) / "checkpoints" / "epoch_2.pt")
    run(tmp_path, manifest, "--num-checkpoints", "4", "--resume", path, "--keep-last", "1", "--lr", "1e-3")
    assert checkpoints_of(tmp_path) == {"4-step12": 12}  # the files of label 4 are left behind, not written over
    stored = torch.load(folder_of(tmp_path) / "checkpoints" / "epoch_4-step12.pt", weights_only=True)
    assert stored["config"]["flags"]["lr"] == 1e-3
    assert list(metrics(tmp_path)) == list(range(1, 13))  # steps 7 to 12 of the first try are gone


def test_another_runs_checkpoint_does_not_continue_in_a_folder_that_holds_a_run(tmp_path, manifest):
    run(tmp_path, manifest, name="a")
    run(tmp_path, manifest, name="b")
    path = str(folder_of(tmp_path, "b") / "checkpoints" / "epoch_1.pt")
    with pytest.raises(ConfigError, match="already holds a run"):
        run(tmp_path, manifest, "--resume", path, name="a", steps=20)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--global-batch-size", "5"], r"768 tokens, 128 a step.*80 tokens of --global-batch-size"),
        (["--optimizer", "lion"], "--optimizer was adamw, is now lion"),
    ],
)
def test_what_would_not_add_up_is_refused(tmp_path, manifest, extra, message):
    run(tmp_path, manifest, steps=6)
    with pytest.raises(CheckpointError, match=message):
        run(tmp_path, manifest, "--resume", "latest", *extra, steps=12)
    assert checkpoints_of(tmp_path) == {"1": 6}


@pytest.mark.parametrize("batch", [4, 16])
def test_another_batch_goes_on_in_tokens(tmp_path, manifest, batch):
    run(tmp_path, manifest, "--num-checkpoints", "2", "--stop-at-step", "6")
    length = ["--num-checkpoints", "2", "--resume", "latest"]
    done = run(tmp_path, manifest, *length, steps=12 * 8 // batch, batch=batch)
    assert done.step == 12 * 8 // batch
    last = newest_in(str(folder_of(tmp_path)), "all")
    stats = torch.load(last.path.replace("epoch_", "optimizer_").replace("optimizer_", "stats_"), weights_only=True)
    assert last.commit.facts["tokens"] == 12 * 8 * 16 and stats["data_state"]["samples_consumed"] == 12 * 8
    assert run(tmp_path, manifest, *length, steps=12 * 8 // batch, batch=batch).step == done.step


def test_flags_of_the_optimizer_count_after_a_resume(tmp_path, manifest):
    run(tmp_path, manifest, steps=6)
    run(tmp_path, manifest, "--resume", "latest", "--wd", "0.05", "--beta2", "0.5", steps=12)
    saved = torch.load(folder_of(tmp_path) / "checkpoints" / "optimizer_1-step12.pt", weights_only=True)["optimizer"]
    assert saved["param_groups"][0]["weight_decay"] == 0.05
    assert {tuple(group["betas"]) for group in saved["param_groups"]} == {(0.9, 0.5)}


def test_another_save_frequency_deletes_nothing_that_was_kept(tmp_path, manifest):
    run(tmp_path, manifest, "--num-checkpoints", "4", steps=8)
    run(tmp_path, manifest, "--num-checkpoints", "8", "--resume", "latest", "--save-frequency", "3", steps=16)
    assert {"1", "2", "3", "4"} <= set(checkpoints_of(tmp_path))


def test_an_old_openlm_optimizer_file_with_numbered_parameters_continues(tmp_path, manifest):
    """OpenLM numbers the parameters in the order of named_parameters: rewrite ours so, and go on from it."""
    run(tmp_path, manifest, "--num-checkpoints", "2", name="straight")
    folder = folder_of(tmp_path, "straight") / "checkpoints"
    old = tmp_path / "old"
    old.mkdir()
    epoch = torch.load(folder / "epoch_1.pt", weights_only=True)
    names = [name for name in epoch["state_dict"] if "inv_freq" not in name]
    optimizer = torch.load(folder / "optimizer_1.pt", weights_only=True)["optimizer"]
    group = {**optimizer["param_groups"][0], "params": list(range(len(names))), "lr": np.float64(0.25)}
    numbered = {"state": {k: optimizer["state"][name] for k, name in enumerate(names)}, "param_groups": [group]}
    bare = {"module." + name: tensor for name, tensor in epoch["state_dict"].items()}
    torch.save({"epoch": 1, "name": "old", "state_dict": bare, "step": 6, "evaluation_metrics": []}, old / "epoch_1.pt")
    torch.save({"epoch": 1, "name": "old", "optimizer": numbered}, old / "optimizer_1.pt")
    torch.save({"epoch": 1, "step": 6, "samples_seen": 48, "next_shard_per_source": [0]}, old / "stats_1.pt")
    run(tmp_path, manifest, "--num-checkpoints", "2", "--resume", str(old / "epoch_1.pt"), name="new")
    assert metrics(tmp_path, "new") == {k: v for k, v in metrics(tmp_path, "straight").items() if k > 6}
    torch.testing.assert_close(weights(tmp_path, "new", "2"), weights(tmp_path, "straight", "2"), rtol=0, atol=0)


def test_evaluating_the_latest_checkpoint_needs_one_and_takes_its_model(tmp_path, manifest):
    arguments = ["--val-data", str(tmp_path / "data" / "00000000.tar"), "--device", "cpu", "--precision", "fp32"]
    arguments += ["--logs", str(tmp_path / "logs"), "--name", "run", "--resume", "latest"]
    with pytest.raises(CheckpointError, match="no checkpoint"):
        main([*arguments, "--model", "open_lm_test_tiny"])
    trained = run(tmp_path, manifest)
    params = (folder_of(tmp_path) / "params.txt").read_text()
    assert main(arguments).step == trained.step  # without --model
    assert (folder_of(tmp_path) / "params.txt").read_text() == params


def test_a_diverged_run_keeps_the_checkpoint_before(tmp_path, manifest, monkeypatch):
    from open_lm.train import step

    real = step.set_lr
    monkeypatch.setattr(step, "set_lr", lambda optimizers, lr: real(optimizers, lr if lr_calls() < 9 else math.inf))
    calls = iter(range(100))
    lr_calls = lambda: next(calls)  # noqa: E731
    with pytest.raises(TrainingDiverged, match=r"--lr.*--resume"):
        run(tmp_path, manifest, "--num-checkpoints", "2", "--log-every-n-steps", "100")
    assert checkpoints_of(tmp_path) == {"1": 6}
    assert newest_in(str(folder_of(tmp_path)), "all")


def test_two_ranks_stop_together_on_a_loss_that_is_not_finite(tmp_path, manifest):
    done = run_command(flags(tmp_path, manifest, "--lr", "1e38"), ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("error: loss") == 1 and "Traceback" not in done.stderr.split("torch/distributed")[0]
    assert not checkpoints_of(tmp_path)


def test_seventeen_sequences_in_batches_of_eight_on_two_ranks_count_once_each(tmp_path, manifest):
    held_out = write_data(tmp_path / "held_out", (17,), seed=1).replace("manifest.jsonl", "00000000.tar")
    extra = ["--val-data", held_out, "--global-val-batch-size", "8", "--val-names", "seventeen"]
    run(tmp_path, manifest, *extra, name="one", steps=4)
    done = run_command(flags(tmp_path, manifest, *extra, "--fsdp", name="two", steps=4), ranks=2)
    assert done.returncode == 0, done.stderr
    rows = [json.loads((folder_of(tmp_path, n) / "checkpoints/results.jsonl").read_text())[0] for n in ("one", "two")]
    assert [(row["sequences"], row["tokens"], row["name"]) for row in rows] == [(17, 17 * SEQ_LEN, "seventeen")] * 2
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], abs=1e-5)


def test_validation_every_so_many_steps_or_intervals(tmp_path, manifest):
    held_out = str(tmp_path / "data" / "00000000.tar")
    common = ["--val-data", held_out, "--val-num-samples", str(5 * SEQ_LEN), "--val-batch-size", "2"]
    run(tmp_path, manifest, *common, "--val-every-steps", "5", name="steps")
    assert list(metrics(tmp_path, "steps", key="valid/loss")) == [5, 10, 12]
    assert set(metrics(tmp_path, "steps", key="valid/tokens").values()) == {5 * SEQ_LEN}
    run(tmp_path, manifest, *common, "--num-checkpoints", "4", "--val-frequency", "2", name="intervals")
    assert list(metrics(tmp_path, "intervals", key="valid/loss")) == [6, 12]


def test_a_loss_scale_that_overflows_skips_the_step_and_the_run_goes_on(tmp_path, manifest, monkeypatch):
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: real(device, growth_interval=2))
    run(tmp_path, manifest, "--precision", "fp16", steps=20)
    scales = metrics(tmp_path, key="train/loss_scale")
    assert any(scales[k + 1] < scales[k] for k in range(1, 20)), "the scale never overflowed: the test shows nothing"
    assert metrics(tmp_path)[20] < metrics(tmp_path)[1]


def test_a_run_resumes_in_a_folder_whose_name_reads_as_a_pattern(tmp_path, manifest):
    odd = tmp_path / "run[1] *?"
    run(odd, manifest, "--num-checkpoints", "2", "--stop-at-step", "4")
    assert run(odd, manifest, "--num-checkpoints", "2", "--resume", "latest").step == 12
    assert checkpoints_of(odd) == {"0-step4": 4, "1": 6, "2": 12}  # went on, did not start again
