"""Adapters: nothing changes at the start, only they are trained, and merged or in PEFT they compute the same."""

import pytest
import torch
from runs import folder_of, metrics, run, weights, write_data
from tiny_adapters import IDS, adapted
from tiny_models import make_model

from open_lm.checkpoint.load_model import load_model
from open_lm.errors import CheckpointError, ConfigError
from open_lm.model.lora import adapters_of, adapters_off, without_additions


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "own_geglu", "mamba"])
def test_the_start_is_bit_equal_to_the_base(name, dora):
    before = make_model(name)(IDS)[0]
    assert torch.equal(adapted(name, moved=False, with_magnitude=dora)(IDS)[0], before)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "own_geglu"])
def test_merged_weights_compute_what_the_adapters_do(name, dora):
    model, plain = adapted(name, with_magnitude=dora), make_model(name)
    expected = model(IDS)[0]
    assert (expected - plain(IDS)[0]).abs().max() > 0.01
    with adapters_off(model):
        torch.testing.assert_close(model(IDS)[0], plain(IDS)[0], rtol=0, atol=0)
    plain.load_state_dict(without_additions(model.state_dict()))
    torch.testing.assert_close(plain(IDS)[0], expected, rtol=0, atol=2e-6 * expected.abs().max().item())
    merged = plain.state_dict()
    for layer, adapted_layer in adapters_of(model).items():
        weight, low_rank = adapted_layer.weight.double(), adapted_layer.lora_B.double() @ adapted_layer.lora_A.double()
        exact = weight + adapted_layer.lora_scale.double() * low_rank
        if dora:
            exact *= (adapted_layer.lora_magnitude.double() / exact.norm(dim=1))[:, None]
        assert (merged[f"{layer}.weight"].double() - exact).abs().max() <= 1e-6 * exact.abs().max(), layer


def test_only_the_adapters_are_trained_and_the_base_stays(tmp_path):
    manifest = write_data(tmp_path / "data")
    base = run(tmp_path, manifest, name="base", steps=4)
    start = f"{base.folder}/checkpoints/epoch_1.pt"
    result = run(tmp_path, manifest, "--pretrained", start, "--lora-rank", "4", "--wd", "0.1", steps=8)
    before, after = weights(tmp_path, "base"), weights(tmp_path)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name.rpartition(".")[2] for name in set(after) - set(before)} == {"lora_A", "lora_B", "lora_scale"}
    moments = torch.load(folder_of(tmp_path) / "checkpoints" / "optimizer_1.pt", weights_only=True)["optimizer"][
        "state"
    ]
    assert moments and all("lora_" in name for name in moments)
    losses = list(metrics(tmp_path).values())
    assert losses[0] == pytest.approx(metrics(tmp_path, "base")[4], abs=0.5)
    merged = load_model(result.folder)
    assert set(merged.state_dict()) >= set(before)
    name = "layers.0.attention.in_proj.weight"
    low_rank = after[name.replace("weight", "lora_B")] @ after[name.replace("weight", "lora_A")]
    torch.testing.assert_close(merged.state_dict()[name], before[name] + 4.0 * low_rank)


@pytest.mark.parametrize("flags", [["--lora-rank", "4"], ["--lora-rank", "4", "--dora", "--rslora"]])
def test_a_killed_run_with_adapters_resumes_bit_equal(tmp_path, flags):
    manifest = write_data(tmp_path / "data")
    run(tmp_path, manifest, *flags, "--lora-dropout", "0", name="whole", steps=6)
    run(tmp_path, manifest, *flags, "--save-every-steps", "3", "--stop-at-step", "3", name="again", steps=6)
    run(tmp_path, manifest, *flags, "--resume", "latest", name="again", steps=6)
    for name, tensor in weights(tmp_path, "whole").items():
        assert torch.equal(tensor, weights(tmp_path, "again")[name]), name


def test_resuming_with_another_rank_or_none_is_refused(tmp_path):
    manifest = write_data(tmp_path / "data")
    run(tmp_path, manifest, "--lora-rank", "4", "--save-every-steps", "3", "--stop-at-step", "3", steps=6)
    for flags in ([], ["--lora-rank", "2"]):
        with pytest.raises(CheckpointError, match="--lora-rank was 4"):
            run(tmp_path, manifest, "--resume", "latest", *flags, steps=6)


def test_adapters_start_from_sharded_weights(tmp_path):
    manifest = write_data(tmp_path / "data")
    base = run(tmp_path, manifest, "--checkpoint-format", "sharded", name="base", steps=2)
    run(tmp_path, manifest, "--pretrained", base.folder, "--lora-rank", "4", "--lr", "1e-30", steps=1)
    expected = load_model(base.folder).state_dict()
    assert all(
        torch.equal(weights(tmp_path)[name], tensor) for name, tensor in expected.items() if "inv_freq" not in name
    )


def test_targets_by_name(tmp_path):
    model = adapted(targets=["in_proj"])
    assert {name.rpartition(".")[2] for name in adapters_of(model)} == {"in_proj"}
    with pytest.raises(ConfigError, match=r"--lora-targets q_proj: no such linear layer. There are in_proj"):
        adapted(targets=["q_proj"])
    with pytest.raises(ConfigError, match=r"--lora-targets out_porj: no such linear layer"):
        adapted(targets=["in_proj", "out_porj"])
    with pytest.raises(ConfigError, match="give --lora-rank"):
        run(tmp_path, "x", "--dora")
