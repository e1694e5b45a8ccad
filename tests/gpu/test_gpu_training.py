"""Training on a GPU: every precision trains, compiled too, and agrees with the CPU."""

import pytest
import torch
from runs import metrics, run, write_data

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


@pytest.fixture
def manifest(tmp_path):
    return write_data(tmp_path / "data")


def test_fp32_on_the_gpu_follows_the_cpu(tmp_path, manifest):
    run(tmp_path, manifest, name="cpu")
    run(tmp_path, manifest, "--device", "cuda", name="gpu")
    expected, got = metrics(tmp_path, "cpu"), metrics(tmp_path, "gpu")
    assert list(got.values()) == pytest.approx(list(expected.values()), abs=1e-3)


@pytest.mark.parametrize("precision", ["amp", "amp_bf16", "bf16", "fp16"])
@pytest.mark.parametrize("extra", [[], ["--torchcompile"], ["--fsdp", "--fsdp-amp", "--force-distributed"]])
def test_every_precision_learns(tmp_path, manifest, precision, extra):
    run(tmp_path, manifest, "--device", "cuda", "--precision", precision, *extra)
    losses = list(metrics(tmp_path).values())
    assert losses[-1] < losses[0] - 0.2
    assert metrics(tmp_path, key="train/forward_time")[12] > 0


def test_a_run_resumed_on_the_gpu_goes_on_where_it_was(tmp_path, manifest):
    extra = ["--device", "cuda", "--precision", "amp", "--num-checkpoints", "2"]
    run(tmp_path, manifest, *extra, name="straight")
    run(tmp_path, manifest, *extra, name="broken")
    (tmp_path / "logs/broken/checkpoints/epoch_2.commit.json").unlink()
    run(tmp_path, manifest, *extra, "--resume", "latest", name="broken")
    assert metrics(tmp_path, "broken") == pytest.approx(metrics(tmp_path, "straight"), abs=1e-4)
