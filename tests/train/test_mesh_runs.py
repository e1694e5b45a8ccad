"""Runs over meshes: the losses and weights of one process, checkpoints that any other mesh goes on from."""

import json

import pytest
import torch
from runs import flags, folder_of, metrics, run, run_command, weights, write_data

MODEL = {"hidden_dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "seq_len": 16, "vocab_size": 16,
         "qk_norm": True, "model_norm": "rms_norm", "ffn_dim": 48}  # fmt: skip
COMMON = ["--num-checkpoints", "2", "--grad-clip-norm", "1", "--averagers", "ema_0.9_1",
          "--log-avg-model-training-loss", "4"]  # fmt: skip


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A run in one process, its data and the flags of its model."""
    folder = tmp_path_factory.mktemp("single")
    manifest = write_data(folder / "data")
    (folder / "model.json").write_text(json.dumps(MODEL))
    common = ["--model", str(folder / "model.json"), *COMMON, "--val-data", manifest]
    run(folder, manifest, *common)
    return folder, manifest, common


def assert_same_run(folder, other):
    for key in ("train/loss", "train/grad_norm", "train/ema_0.9_1_loss", "valid/loss"):
        expected = metrics(folder, key=key)
        assert expected and metrics(other, key=key) == pytest.approx(expected, abs=2e-5, rel=1e-4), key
    for label in ("2",):
        torch.testing.assert_close(weights(other, label=label), weights(folder, label=label), rtol=1e-4, atol=5e-5)


def go(tmp_path, manifest, common, *extra, ranks):
    done = run_command(flags(tmp_path, manifest, *common, *extra), ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def forget_second(tmp_path):
    for old in (folder_of(tmp_path) / "checkpoints").glob("*_2*"):
        if old.is_dir():
            for part in old.iterdir():
                part.unlink()
            old.rmdir()
        else:
            old.unlink()


@pytest.mark.parametrize("form", ["sharded", pytest.param("consolidated", marks=pytest.mark.slow)])
def test_saved_under_tensor_parallel_resumed_by_one_process(tmp_path, single, form):
    folder, manifest, common = single
    go(tmp_path, manifest, common, "--mesh", "tp=2", "--checkpoint-format", form, ranks=2)
    forget_second(tmp_path)
    done = go(tmp_path, manifest, common, "--resume", "latest", ranks=1)
    assert "resumed from" in done.stderr
    assert_same_run(folder, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "form"),
    [
        ("tp=2", "cp=2,fsdp=2", "sharded"),
        ("fsdp=2", "tp=2,dp=2", "sharded"),
        ("dp=2", "cp=2,tp=2", "consolidated"),
    ],
)
def test_saved_under_one_mesh_resumed_under_another(tmp_path, single, first, second, form):
    folder, manifest, common = single
    common = [*common, "--checkpoint-format", form]
    go(tmp_path, manifest, common, "--mesh", first, ranks=2)
    forget_second(tmp_path)
    done = go(tmp_path, manifest, common, "--mesh", second, "--resume", "latest", ranks=4)
    assert "resumed from" in done.stderr
    go(tmp_path, manifest, [*common, "--checkpoint-format", "consolidated"], "--resume", "latest", ranks=1)
    assert list(metrics(tmp_path).values()) == pytest.approx(list(metrics(folder).values()), abs=2e-5)
