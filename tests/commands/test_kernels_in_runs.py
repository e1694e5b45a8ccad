"""Runs with the C++ kernels: the losses of plain torch, on any number of ranks, to the bit when repeated."""

import json

import pytest
from runs import metrics, run_command

from open_lm.kernels import native

ARCHITECTURE = {"hidden_dim": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "seq_len": 1024, "vocab_size": 1024}


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Train three steps by the command; returns the losses and what the log says."""
    folder = tmp_path_factory.mktemp("runs")
    if not native.use_cpu_kernels():
        pytest.skip("the C++ kernels do not run here: no compiler or no AVX-512")
    native.use_cpu_kernels(False)
    (folder / "model.json").write_text(json.dumps(ARCHITECTURE))

    def losses(name, *extra, ranks=1):
        done = run_command(
            ["--dataset-type", "synthetic", "--model", str(folder / "model.json"), "--device", "cpu",
             "--train-tokens", str(3 * 4 * 1024), "--global-batch-size", "4", "--warmup", "1", "--lr", "1e-2",
             "--log-every-n-steps", "1", "--workers", "0", "--logs-dir", str(folder / "logs"), "--name", name, *extra],
            ranks=ranks,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return list(metrics(folder, name).values()), done.stderr

    return losses


def test_a_run_computes_with_them_what_it_computes_without(train):
    plain, said = train("plain", "--precision", "fp32", "--cpu-kernels", "off")
    assert "C++" not in said
    first, said = train("first", "--precision", "fp32")
    assert said.count("computed by C++ kernels") == 1
    assert len(first) == 3
    assert first == pytest.approx(plain, abs=1e-5)
    assert train("second", "--precision", "fp32")[0] == first
    many, _ = train("many", "--precision", "fp32", "--fsdp", "--grad-checkpointing-mode", "selective", ranks=2)
    assert many == pytest.approx(plain, abs=1e-5)


def test_in_bf16_the_losses_stay_near(train):
    plain, _ = train("plain16", "--precision", "amp_bf16", "--cpu-kernels", "off")
    assert train("fast16", "--precision", "amp_bf16")[0] == pytest.approx(plain, rel=2e-3)
