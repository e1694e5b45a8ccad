"""Meshes that a model does not divide among are refused before anything is built, `--dry-run` included."""

import json

import pytest

from open_lm.errors import ConfigError
from open_lm.main import main

MODEL = {"hidden_dim": 48, "n_layers": 2, "n_heads": 6, "seq_len": 24, "vocab_size": 60, "ffn_dim": 72}
EXPERTS = {"moe_freq": 2, "moe_num_experts": 4}


def forecast(tmp_path, mesh, ranks, *flags, **changes):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(MODEL | changes))
    main(["--dry-run", "--dataset-type", "synthetic", "--model", str(path), "--mesh", mesh, "--preset-world-size",
          str(ranks), "--global-batch-size", "12", "--train-steps", "4", "--warmup", "1", *flags])  # fmt: skip


@pytest.mark.parametrize(
    ("mesh", "ranks", "changes", "said"),
    [
        ("tp=4", 4, {}, "--mesh tp=4: 6 heads of keys and values do not divide among 4"),
        ("tp=2", 2, {"n_kv_heads": 3}, "--mesh tp=2: 3 heads of keys and values"),
        ("tp=2", 2, {"ffn_dim": 73}, "--mesh tp=2: SwiGLU.w12 has 73 rows"),
        ("tp=2", 2, {**EXPERTS, "ffn_dim": 71}, "--mesh tp=2: MixtureOfExperts.experts has 71 rows"),
        ("tp=2", 2, {"vocab_size": 61}, "Make vocab_size 62"),
        ("tp=5", 5, {}, "sequences of 24 do not divide into 5 parts"),
        ("cp=8", 8, {}, "sequences of 24 do not divide into 16 pieces"),
        ("cp=2,tp=4", 8, {"n_heads": 8, "seq_len": 20}, "4 pieces of a multiple of 4"),
        ("ep=2", 2, {}, "--mesh ep=2: the model has no experts"),
        ("ep=3", 3, EXPERTS, "--mesh ep=3: 4 experts do not divide among 3"),
        ("tp=²", 2, {}, "tp '²' is no number of ranks"),
        ("dp=5", 5, {}, "--global-batch-size 12 does not divide among 5 ranks"),
    ],
)
def test_a_model_that_does_not_divide_is_refused_by_its_forecast(tmp_path, mesh, ranks, changes, said):
    with pytest.raises(ConfigError, match=said):
        forecast(tmp_path, mesh, ranks, **changes)


@pytest.mark.parametrize("capacity", [1.25, 0.0])
def test_what_divides_is_forecast(tmp_path, capsys, capacity):
    forecast(tmp_path, "ep=2,tp=2", 4, **EXPERTS, moe_capacity_factor=capacity)
    found = capsys.readouterr().out
    assert "memory a rank" in found and "ranks         4 (ep=2,tp=2)" in found


def test_an_axis_without_a_number_is_named():
    with pytest.raises(ConfigError, match="tp '' is no number of ranks"):
        main(["--dry-run", "--dataset-type", "synthetic", "--mesh", "tp", "--model", "open_lm_test_tiny"])


def test_an_optimizer_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--optimizer adafactor.* leave out --mesh tp=2"):
        forecast(tmp_path, "tp=2", 2, "--optimizer", "adafactor")


def test_the_mode_of_recomputation_switches_it_on_in_the_forecast_too(tmp_path, capsys):
    def memory(*flags):
        forecast(tmp_path, "fsdp=2", 2, *flags, n_layers=4)
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("memory a rank"))

    full, kept = memory("--grad-checkpointing"), memory()
    assert memory("--grad-checkpointing-mode", "full") == full != kept
    assert memory("--grad-checkpointing-mode", "every-2") not in (full, kept)
    assert memory("--averagers", "ema_0.9_1") != kept != memory("--optimizer", "lion")
