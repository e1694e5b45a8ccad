"""Whole training runs: what they learn, what they leave behind, and that a resumed run is the same run."""

import json

import pytest
import torch
import yaml
from runs import SEQ_LEN, folder_of, metrics, run, run_command, weights, write_data

from open_lm.errors import CheckpointError, ConfigError, DataError
from open_lm.params import parse_args


@pytest.fixture
def manifest(tmp_path):
    return write_data(tmp_path / "data")


def test_a_run_learns_and_leaves_what_people_look_for(tmp_path, manifest):
    held_out = write_data(tmp_path / "held_out", (17,), seed=1)
    result = run(
        tmp_path,
        manifest,
        "--val-data",
        held_out.replace("manifest.jsonl", "00000000.tar"),
        "--report-to",
        "tensorboard",
    )
    losses = metrics(tmp_path)
    assert losses[12] < losses[1] - 0.2
    folder = folder_of(tmp_path)
    assert (result.folder, result.step) == (str(folder), 12)
    params = yaml.safe_load((folder / "params.txt").read_text())
    of_openlm = ("seq_len", "vocab_size", "per_gpu_batch_size", "per_gpu_val_batch_size", "world_size", "distributed")
    assert [params[name] for name in of_openlm] == [16, 16, 8, 8, 1, False]
    assert parse_args(["--config", str(folder / "params.txt")]).lr == 0.01
    assert params["lr"] == 0.01 and params["model"] == "open_lm_test_tiny" and params["val_data"]
    (row,) = json.loads((folder / "checkpoints" / "results.jsonl").read_text())
    assert (row["sequences"], row["tokens"], row["train_tokens"]) == (17, 17 * SEQ_LEN, 12 * 8 * SEQ_LEN)
    assert row["loss"] == result.validation[0].loss == metrics(tmp_path, key="valid/loss")[12]
    assert "step 12/12" in (folder / "out.log").read_text()
    assert list((folder / "tensorboard").iterdir())
    stats = torch.load(folder / "checkpoints" / "stats_1.pt", weights_only=True)
    assert (stats["step"], stats["samples_seen"], stats["is_final_checkpoint"]) == (12, 96, True)
    epoch = torch.load(folder / "checkpoints" / "epoch_1.pt", weights_only=True)
    assert epoch["config"]["model"]["hidden_dim"] == 16 and epoch["epoch"] == 1


def test_tokens_asked_are_tokens_trained(tmp_path, manifest):
    run(tmp_path, manifest, "--train-tokens", str(5 * 8 * SEQ_LEN + 8 * SEQ_LEN - 1))
    assert max(metrics(tmp_path, key="train/tokens").values()) == 5 * 8 * SEQ_LEN


def test_intervals_end_where_openlms_flags_say(tmp_path, manifest):
    arguments = ["--train-num-samples", str(3 * 8 * SEQ_LEN), "--epochs", "3"]
    flags_without_tokens = [
        f for f in _flags(tmp_path, manifest) if f != "--train-tokens" and f != str(12 * 8 * SEQ_LEN)
    ]
    from open_lm.main import main

    main([*flags_without_tokens, *arguments])
    commits = sorted((folder_of(tmp_path) / "checkpoints").glob("*.commit.json"))
    assert [json.loads(c.read_text())["step"] for c in commits] == [3, 6, 9]


def _flags(tmp_path, manifest):
    from runs import flags

    return flags(tmp_path, manifest)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_resumed_run_ends_bit_equal_to_the_uninterrupted_one(tmp_path, manifest, workers):
    extra = ["--num-checkpoints", "3", "--workers", workers]
    run(tmp_path, manifest, *extra, name="straight")
    run(tmp_path, manifest, *extra, name="broken")
    checkpoints = folder_of(tmp_path, "broken") / "checkpoints"
    for label in ("2", "3"):
        (checkpoints / f"epoch_{label}.commit.json").unlink()  # as if killed before the second was complete
    run(tmp_path, manifest, *extra, "--resume", "latest", name="broken")
    torch.testing.assert_close(weights(tmp_path, "broken", "3"), weights(tmp_path, "straight", "3"), rtol=0, atol=0)
    assert metrics(tmp_path, "broken") == metrics(tmp_path, "straight")


def test_resuming_a_finished_run_says_so_and_changes_nothing(tmp_path, manifest):
    run(tmp_path, manifest)
    before = weights(tmp_path)
    result = run(tmp_path, manifest, "--resume", "latest")
    assert result.step == 12
    torch.testing.assert_close(weights(tmp_path), before, rtol=0, atol=0)
    assert "nothing left to train" in (folder_of(tmp_path) / "out.log").read_text()


def test_resume_latest_without_a_checkpoint_starts_at_the_beginning(tmp_path, manifest):
    assert run(tmp_path, manifest, "--resume", "latest").step == 12


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, manifest):
    run(tmp_path, manifest, "--num-checkpoints", "3", name="straight")
    run(tmp_path, manifest, "--num-checkpoints", "3")
    path = folder_of(tmp_path) / "checkpoints" / "optimizer_3.pt"
    path.write_bytes(path.read_bytes()[:-100])
    run(tmp_path, manifest, "--num-checkpoints", "3", "--resume", "latest")
    torch.testing.assert_close(weights(tmp_path, label="3"), weights(tmp_path, "straight", "3"), rtol=0, atol=0)
    assert "optimizer_3.pt has" in (folder_of(tmp_path) / "out.log").read_text()


def test_evaluating_a_checkpoint_gives_the_loss_the_run_reported(tmp_path, manifest):
    from open_lm.main import main

    held_out = str(tmp_path / "data" / "00000001.tar")
    trained = run(tmp_path, manifest, "--val-data", held_out)
    path = str(folder_of(tmp_path) / "checkpoints" / "epoch_1.pt")
    arguments = [
        "--val-data",
        held_out,
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--logs",
        str(tmp_path),
        "--name",
        "eval",
    ]
    for way in ("--resume", "--pretrained"):
        result = main([*arguments, way, path])  # no --model: it is in the checkpoint
        assert result.validation[0].loss == pytest.approx(trained.validation[0].loss, abs=1e-6)
    (row,) = json.loads((tmp_path / "eval" / "checkpoints" / "results.jsonl").read_text().splitlines()[-1])
    assert row["checkpoint_path"] == path and row["train_tokens"] == 12 * 8 * SEQ_LEN


def test_pretrained_takes_the_weights_and_starts_anew(tmp_path, manifest):
    run(tmp_path, manifest)
    path = str(folder_of(tmp_path) / "checkpoints" / "epoch_1.pt")
    result = run(tmp_path, manifest, "--pretrained", path, name="second")
    assert result.step == 12
    assert metrics(tmp_path, "second")[1] < metrics(tmp_path)[1] - 0.1


@pytest.mark.parametrize("ranks", [2])
def test_ranks_and_accumulation_give_the_same_loss_curve(tmp_path, manifest, ranks):
    from runs import flags

    run(tmp_path, manifest, name="one")
    arguments = flags(tmp_path, manifest, "--accum-freq", "2", "--workers", "1", name="two")
    done = run_command(arguments, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert list(metrics(tmp_path, "two").values()) == pytest.approx(list(metrics(tmp_path, "one").values()), abs=1e-5)
    torch.testing.assert_close(weights(tmp_path, "two"), weights(tmp_path, "one"), rtol=1e-4, atol=1e-5)


def test_retention_keeps_the_newest_only_after_it_is_complete(tmp_path, manifest):
    run(tmp_path, manifest, "--num-checkpoints", "4", "--delete-previous-checkpoint")
    assert sorted(p.name for p in (folder_of(tmp_path) / "checkpoints").iterdir()) == [
        "epoch_4.commit.json", "epoch_4.pt", "optimizer_4.pt", "stats_4.pt",
    ]  # fmt: skip


def test_save_frequency_and_most_recent(tmp_path, manifest):
    run(tmp_path, manifest, "--num-checkpoints", "5", "--save-frequency", "2", "--save-most-recent")
    labels = {p.name for p in (folder_of(tmp_path) / "checkpoints").glob("epoch_*.pt")}
    assert labels == {"epoch_2.pt", "epoch_4.pt", "epoch_5.pt"}


def test_one_sequence_too_many_is_said_before_the_first_step(tmp_path, manifest):
    with pytest.raises(DataError, match=r"112 sequences.*110"):
        run(tmp_path, manifest, steps=14)
    assert not (folder_of(tmp_path) / "metrics.jsonl").exists() or not metrics(tmp_path)


def test_another_architecture_is_refused_by_name(tmp_path, manifest):
    run(tmp_path, manifest)
    path = str(folder_of(tmp_path) / "checkpoints" / "epoch_1.pt")
    with pytest.raises(CheckpointError, match="positional_embedding_type"):
        run(tmp_path, manifest, "--resume", path, "--positional-embedding-type", "head_rotary", name="other")


def test_other_data_are_refused_on_resume(tmp_path, manifest):
    run(tmp_path, manifest, "--num-checkpoints", "2")
    (folder_of(tmp_path) / "checkpoints" / "epoch_2.commit.json").unlink()
    other = write_data(tmp_path / "other", (50, 61), seed=5)
    with pytest.raises(CheckpointError, match="data"):
        run(tmp_path, other, "--num-checkpoints", "2", "--resume", "latest")


def test_a_run_folder_that_exists_is_not_touched(tmp_path, manifest):
    run(tmp_path, manifest)
    before = (folder_of(tmp_path) / "params.txt").read_text()
    with pytest.raises(ConfigError, match="--resume latest"):
        run(tmp_path, manifest, "--lr", "1e-3")
    assert (folder_of(tmp_path) / "params.txt").read_text() == before


def test_braces_name_shards_and_openlms_flags_work_together(tmp_path, manifest):
    from open_lm.main import main

    shards, logs = str(tmp_path / "data" / "{00000000..00000001}.tar"), str(tmp_path / "logs")
    arguments = [
        "--train-data", shards, "--train-num-samples", str(6 * 8 * SEQ_LEN), "--epochs", "2", "--batch-size", "8",
        "--model", "open_lm_test_tiny", "--device", "cpu", "--precision", "amp_bf16", "--z-loss", "1e-4",
        "--lr-scheduler", "const-cooldown", "--epochs-cooldown", "1", "--warmup", "1", "--logs", logs, "--name", "run",
        "--log-every-n-steps", "1", "--torchcompile", "--workers", "1", "--accum", "2",
    ]  # fmt: skip
    assert main(arguments).step == 12
    assert metrics(tmp_path, key="train/lr")[12] < metrics(tmp_path, key="train/lr")[6] == 5e-4
    assert metrics(tmp_path, key="train/z_loss")[1] > 0


def test_a_dry_run_says_what_would_happen_and_touches_nothing(tmp_path, capsys):
    from open_lm.main import main

    arguments = ["--train-data", "/nowhere/{0..9}.tar", "--model", "open_lm_7b", "--logs", str(tmp_path / "logs")]
    main([*arguments, "--train-tokens", "100e6".replace("e6", "000000"), "--num-checkpoints", "2", "--dry-run"])
    shown = capsys.readouterr().out
    assert "6,889,676,800" in shown  # what counting a built 7B gives
    assert "762 of 131,072 tokens" in shown and "after steps 381, 762" in shown
    assert not (tmp_path / "logs").exists()


def test_mfu_is_shown_only_where_the_peak_is_known(tmp_path, manifest):
    run(tmp_path, manifest, "--peak-tflops", "1e-3")
    rates, used = metrics(tmp_path, key="train/tokens_per_second"), metrics(tmp_path, key="train/mfu")
    # open_lm_test_tiny: 6 FLOPs for each weight but the token table, 12 L H K T / 2 for attention
    flops = 6 * (27_296 - 16 * 16) + 12 * 2 * 2 * 8 * 16 // 2
    assert used[12] == pytest.approx(rates[12] * flops / 1e9)
    run(tmp_path, manifest, name="unknown")
    assert not metrics(tmp_path, "unknown", key="train/mfu")
