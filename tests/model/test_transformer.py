"""The Transformer beyond its logits: names of weights, initial values, types, and wrappers."""

import copy
import math

import pytest
import torch
from torch import nn

from open_lm.model import create_model
from open_lm.model.config import ModelConfig, ModelFlags
from open_lm.model.init import init_weights

CONFIG = ModelConfig(hidden_dim=64, n_layers=3, n_heads=4, seq_len=64, vocab_size=101)
IDS = torch.randint(0, 101, (2, 20), generator=torch.Generator().manual_seed(0))


def variant(**changes):
    return ModelConfig(**{**CONFIG.to_dict(), **changes})


def test_names_of_the_state_dict_are_those_of_openlm():
    names = set(create_model(variant(n_layers=1, qk_norm=True, model_norm="gain_only_layer_norm")).state_dict())
    block = [
        "attention.in_proj",
        "attention.out_proj",
        "attention.q_norm",
        "attention.k_norm",
        "attention_norm",
        "ffn_norm",
    ]
    block += ["feed_forward.w12", "feed_forward.w3"]
    expected = {f"layers.0.{name}.weight" for name in block} | {"layers.0.attention.pos_embed.inv_freq"}
    assert names == expected | {"tok_embeddings.weight", "norm.weight", "output.weight"}


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("tok_embeddings.weight", 256**-0.5),
        ("output.weight", 256**-0.5),
        ("layers.2.attention.in_proj.weight", 256**-0.5),
        ("layers.2.feed_forward.w12.weight", 256**-0.5),
        ("layers.0.attention.out_proj.weight", 256**-0.5 / math.sqrt(2)),
        ("layers.2.attention.out_proj.weight", 256**-0.5 / math.sqrt(6)),
        ("layers.2.feed_forward.w3.weight", 768**-0.5 / math.sqrt(6)),
    ],
)
def test_weights_begin_normal_and_cut_at_three_deviations(name, std):
    torch.manual_seed(0)
    weight = create_model(variant(hidden_dim=256)).state_dict()[name]
    assert weight.abs().max() <= 3 * std * 1.000001
    assert weight.abs().max() > 2.9 * std
    cut = 0.98658  # deviation of a standard normal cut at 3
    assert weight.std().item() == pytest.approx(std * cut, rel=0.02)
    assert abs(weight.mean().item()) < 0.02 * std


@pytest.mark.parametrize("ffn_type", ["swiglu", "gelu", "gemma_geglu"])
def test_a_model_built_without_memory_becomes_the_same_model(ffn_type):
    config = variant(ffn_type=ffn_type, model_norm="default_layer_norm")
    torch.manual_seed(3)
    expected = create_model(config).state_dict()
    with torch.device("meta"):
        model = create_model(config)
    assert all(t.is_meta for t in model.state_dict().values())
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.data.fill_(torch.nan)
    torch.manual_seed(3)
    init_weights(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_tied_weights_are_one_parameter():
    model = create_model(variant(weight_tying=True))
    assert model.tok_embeddings.weight is model.output.weight
    assert len([n for n, _ in model.named_parameters() if "embed" in n or "output" in n]) == 1


def test_tied_weights_stay_one_parameter_when_they_are_moved_or_loaded():
    model = create_model(variant(weight_tying=True))
    with torch.device("meta"):
        other = create_model(variant(weight_tying=True))
    other.load_state_dict(model.state_dict(), assign=True)
    for moved in (other, copy.deepcopy(model), model.double()):
        assert moved.tok_embeddings.weight is moved.output.weight


def test_a_head_gets_the_final_hidden_state_and_the_output_matrix():
    model = create_model(CONFIG)
    logits, hidden, _ = model(IDS)

    def head(hidden_BTD, weight_VD):
        assert weight_VD is model.output.weight
        return hidden_BTD, hidden_BTD @ weight_VD.T

    seen, product = model(IDS, head=head)
    assert torch.equal(seen, hidden)
    torch.testing.assert_close(product, logits)


def test_angles_stay_fp32_when_the_model_is_bf16():
    """At position 2047 a bf16 angle is off by radians; only the rounding of weights and activations may remain."""
    from open_lm.model.rotary import Rotary

    config = variant(seq_len=2048, n_layers=1)
    rotary = Rotary(config).bfloat16()
    angles = rotary.angles(torch.arange(2048))
    exact = torch.arange(2048, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(0, 16, 2).double() / 16)
    torch.testing.assert_close(angles.cos[:, 0].double(), exact.cos(), atol=5e-4, rtol=0)
    x = torch.randn(1, 2048, 4, 16).bfloat16()
    assert rotary(x, angles).dtype == torch.bfloat16


@pytest.mark.parametrize("model_norm", ["default_layer_norm", "lp_layer_norm", "rms_norm", "no_wb_layer_norm"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_autocast_to_bf16_stays_near_fp32(model_norm, qk_norm):
    torch.manual_seed(0)
    model = create_model(variant(model_norm=model_norm, qk_norm=qk_norm))
    with torch.autocast("cpu", torch.bfloat16):
        logits, _, past = model(IDS, use_cache=True)
    assert logits.dtype == torch.float32
    assert past[0][0].dtype == past[0][1].dtype == torch.bfloat16
    torch.testing.assert_close(logits, model(IDS)[0], atol=0.1, rtol=0)


def test_low_precision_norms_compute_in_the_autocast_type_and_the_others_in_fp32():
    x = torch.randn(4, 64)
    for name, dtype in (("lp_layer_norm", torch.bfloat16), ("default_layer_norm", torch.float32)):
        norm = create_model(variant(model_norm=name)).norm
        with torch.autocast("cpu", torch.bfloat16):
            assert norm(x).dtype == dtype
        assert norm(x).dtype == torch.float32


def test_a_bf16_model_runs_whole_and_cached():
    model = create_model(variant(qk_norm=True)).bfloat16().eval()
    whole = model(IDS)[0]
    past = model(IDS[:, :12], model.new_cache(2, 20), use_cache=True)[2]
    torch.testing.assert_close(model(IDS[:, 12:], past)[0], whole[:, 12:], atol=0.1, rtol=0)


@pytest.mark.slow
def test_blocks_compile_without_a_break_and_compute_the_same():
    model = create_model(variant(n_layers=2))
    compiled = copy.deepcopy(model)
    for block in compiled.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    for candidate in (model, compiled):
        candidate(IDS)[0].logsumexp(-1).sum().backward()
    for (name, a), (_, b) in zip(model.named_parameters(), compiled.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_cached_rows_can_change_places():
    model = create_model(CONFIG).eval()
    with torch.no_grad():
        cache = model.new_cache(2, 20)
        model(IDS[:, :10], cache)
        cache.reorder(torch.tensor([1, 1]))
        logits = model(IDS[:, 10:], cache)[0]
        swapped = torch.cat((IDS[[1, 1], :10], IDS[:, 10:]), 1)
        torch.testing.assert_close(logits, model(swapped)[0][:, 10:], atol=1e-5, rtol=1e-5)


def test_a_model_is_made_from_flags_or_parsed_flags_too():
    from argparse import Namespace

    by_flags = create_model(ModelFlags(model="open_lm_test_tiny", qk_norm=True))
    by_args = create_model(Namespace(model="open_lm_test_tiny", qk_norm=True, lr=3e-4))
    assert by_flags.config == by_args.config
    assert isinstance(by_flags, nn.Module) and by_flags.config.qk_norm
