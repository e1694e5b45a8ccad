"""QLoRA: weights in 4 bits equal bitsandbytes' bit for bit, and a run on them is exact, resumable and readable."""

import pytest
import torch
from runs import folder_of, metrics, run, weights, write_data
from tiny_adapters import IDS
from tiny_models import make_model

from open_lm.checkpoint.load_model import load_model
from open_lm.errors import CheckpointError, ConfigError
from open_lm.model.lora import adapt, adapters_of, hold_in_nf4
from open_lm.model.nf4 import dequantised, nf4_linear, quantised

QLORA = ["--lora-rank", "4", "--lora-base", "nf4"]


def weight_of(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


@pytest.mark.slow  # bitsandbytes compiles its operators
def test_bits_and_values_equal_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for shape in ((48, 64), (7, 9), (130, 33)):
        weight = weight_of(shape)
        weight.view(-1)[::17] = 0.0
        ours, n_whole = quantised(weight), weight.numel() // 2
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        assert torch.equal(ours.scales, state.absmax)
        assert torch.equal(ours.packed[:n_whole], packed.flatten()[:n_whole])
        assert torch.equal(dequantised(ours), functional.dequantize_4bit(packed, state))


def test_quantising_again_gives_the_same_bits_and_zeros_stay():
    weight = weight_of((33, 40))
    weight[3:6] = 0.0
    once = quantised(weight)
    again = quantised(dequantised(once))
    assert torch.equal(once.packed, again.packed) and torch.equal(once.scales, again.scales)
    assert not dequantised(once)[4].any()
    assert (dequantised(once) - weight).abs().max() < 0.16 * weight.abs().max()


def test_what_state_dicts_hold_in_bf16_gives_the_same_bits():
    model = make_model("llama")
    adapt(model, 2, 1.0)
    model.bfloat16()
    hold_in_nf4(model)
    fp32 = {key: value.float() for key, value in make_model("llama").state_dict().items()}
    model.load_state_dict(model.state_dict() | fp32)
    first = {name: layer.nf4 for name, layer in adapters_of(model).items()}
    model.load_state_dict(model.state_dict())
    for name, layer in adapters_of(model).items():
        assert torch.equal(layer.packed, first[name].packed) and torch.equal(layer.scales, first[name].scales), name


def test_the_product_and_its_gradient_are_those_of_the_full_matrix_which_no_graph_keeps():
    nf4 = quantised(weight_of((24, 40)))
    x = weight_of((2, 5, 40), 1).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        y = nf4_linear(x, nf4)
    upstream = weight_of(y.shape, 2)
    expected = torch.autograd.grad((x @ dequantised(nf4).t() * upstream).sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad((y * upstream).sum(), x)[0], expected)
    torch.testing.assert_close(y, x @ dequantised(nf4).t())
    assert sum(kept) < 24 * 40 * 4 / 6  # bits and scales, never the matrix


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mamba"])
def test_the_start_is_the_model_with_rounded_weights(name):
    model, rounded = make_model(name).eval(), make_model(name).eval()
    adapt(model, 3, 2.0)
    for layer in adapters_of(model):
        weight = rounded.get_submodule(layer).weight
        weight.data = dequantised(quantised(weight))
    hold_in_nf4(model)
    torch.testing.assert_close(model(IDS)[0], rounded(IDS)[0], rtol=1e-6, atol=1e-6)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in rounded.state_dict().items())
    names = {key for key, _ in model.named_parameters()}
    assert not any(f"{layer}.weight" in names for layer in adapters_of(model))
    model.load_state_dict(make_model(name).state_dict() | {k: v for k, v in state.items() if "lora" in k})
    torch.testing.assert_close(model(IDS)[0], rounded(IDS)[0], rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"in_proj\.weight"):
        model.load_state_dict({k: v for k, v in state.items() if not k.endswith("in_proj.weight")})


@pytest.mark.parametrize("flags", [[], ["--dora", "--rslora"]])
def test_a_killed_run_resumes_bit_equal_and_its_checkpoint_is_read_as_any_other(tmp_path, flags):
    manifest = write_data(tmp_path / "data")
    base = run(tmp_path, manifest, name="base", steps=4)
    start = [*QLORA, *flags, "--pretrained", base.folder]
    whole = run(tmp_path, manifest, *start, name="whole", steps=6)
    run(tmp_path, manifest, *start, "--save-every-steps", "3", "--stop-at-step", "3", name="again", steps=6)
    run(tmp_path, manifest, *QLORA, *flags, "--resume", "latest", name="again", steps=6)
    for name, tensor in weights(tmp_path, "whole").items():
        assert torch.equal(tensor, weights(tmp_path, "again")[name]), name
    before, after = weights(tmp_path, "base"), weights(tmp_path, "whole")
    name = "layers.0.attention.in_proj.weight"
    assert torch.equal(after[name], dequantised(quantised(before[name])))
    assert torch.equal(after["tok_embeddings.weight"], before["tok_embeddings.weight"])
    assert metrics(tmp_path, "whole")[6] < metrics(tmp_path, "whole")[1] + 0.05
    moments = torch.load(folder_of(tmp_path, "whole") / "checkpoints/optimizer_1.pt", weights_only=True)["optimizer"]
    assert moments["state"] and all("lora_" in key for key in moments["state"])
    merged = load_model(whole.folder).state_dict()[name]
    if not flags:
        low_rank = after[name.replace("weight", "lora_B")] @ after[name.replace("weight", "lora_A")]
        torch.testing.assert_close(merged, after[name] + 4.0 * low_rank)


def test_what_4_bits_cannot_do_is_refused(tmp_path):
    manifest = write_data(tmp_path / "data")
    with pytest.raises(ConfigError, match="--lora-base nf4 holds weights under adapters"):
        run(tmp_path, manifest, "--lora-base", "nf4")
    with pytest.raises(ConfigError, match="leave out --checkpoint-format sharded"):
        run(tmp_path, manifest, *QLORA, "--checkpoint-format", "sharded")
    with pytest.raises(ConfigError, match="--lora-base nf4: each rank holds all of its bits; leave out --fsdp"):
        run(tmp_path, manifest, *QLORA, "--fsdp")
    sharded = run(tmp_path, manifest, "--checkpoint-format", "sharded", name="sharded", steps=2)
    with pytest.raises(CheckpointError, match="openlm consolidate"):
        run(tmp_path, manifest, *QLORA, "--pretrained", sharded.folder, name="from", steps=2)
    run(tmp_path, manifest, *QLORA, "--save-every-steps", "1", "--stop-at-step", "1", steps=2)
    with pytest.raises(CheckpointError, match="--lora-base was nf4"):
        run(tmp_path, manifest, "--lora-rank", "4", "--resume", "latest", steps=2)
