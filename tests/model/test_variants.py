"""Every variant computes what an independent reference in fp64 computes, whole, cached and padded."""

import pytest
import torch
from model.reference import reference_logits

from open_lm.model import create_model
from open_lm.model.config import ModelConfig
from open_lm.model.mask import Mask
from open_lm.model.variants import ATTN_ACTIVATIONS, FEED_FORWARDS, NORMS, POSITIONS, SEQ_SCALARS

BASE = {"hidden_dim": 24, "n_layers": 2, "n_heads": 4, "seq_len": 16, "vocab_size": 31}


def custom(activation, **more):
    return {"attn_name": "custom_attn", "attn_activation": activation, **more}


VARIANTS = [
    *({"model_norm": name} for name in NORMS),
    *({"model_norm": name, "qk_norm": True} for name in ("default_layer_norm", "rms_norm", "no_wb_layer_norm")),
    *({"ffn_type": name} for name in FEED_FORWARDS),
    *({"positional_embedding_type": name} for name in POSITIONS),
    *({"positional_embedding_type": name, "n_kv_heads": 2} for name in POSITIONS),
    {"n_kv_heads": 1, "qk_norm": True},
    {"post_embed_norm": True},
    {"weight_tying": True},
    {"hidden_dim": 26, "n_heads": 4, "rotary_base": 500.0, "norm_eps": 1e-3, "ffn_dim": 40},
    {"ffn_type": "gelu", "ffn_dim": 40},
    {"model_norm": "rms_norm", "norm_eps": 0.1},
    {"attn_name": "torch_attn"},
    {"sliding_window": 5},
    {"sliding_window": 1, "n_kv_heads": 2, "attn_name": "torch_attn"},
    {"sliding_window": 4, "n_kv_heads": 2, "qk_norm": True, "positional_embedding_type": "llama_rotary"},
    *(custom(name) for name in ATTN_ACTIVATIONS),
    custom("relu", n_kv_heads=2),
    custom("softmax", sliding_window=3),
    *(custom("relu", attn_seq_scalar=name, attn_seq_scalar_alpha=0.7) for name in SEQ_SCALARS),
]


def shown(variant):
    return "-".join(str(value) for value in variant.values())


def build(variant, seed=0):
    """A model whose norms have weights and biases unlike those it starts with."""
    torch.manual_seed(seed)
    model = create_model(ModelConfig(**{**BASE, **variant})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("variant", VARIANTS, ids=shown)
def test_logits_equal_the_reference(variant):
    model = build(variant)
    ids = torch.randint(0, 31, (2, 13), generator=torch.Generator().manual_seed(1))
    logits = model(ids)[0].detach().double()
    for row, expected_ids in zip(logits, ids, strict=True):
        torch.testing.assert_close(
            row, reference_logits(model.state_dict(), model.config, expected_ids), atol=2e-5, rtol=1e-5
        )


@pytest.mark.parametrize("kind", POSITIONS)
def test_gradients_equal_those_of_the_reference(kind):
    model = build({"positional_embedding_type": kind, "n_kv_heads": 2})
    ids = torch.randint(0, 31, (1, 9))
    model(ids)[0].square().sum().backward()
    exact = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    reference_logits(exact, model.config, ids[0]).square().sum().backward()
    for name, parameter in model.named_parameters():
        largest = exact[name].grad.abs().max().item()
        torch.testing.assert_close(parameter.grad.double(), exact[name].grad, atol=2e-5 * largest, rtol=1e-4, msg=name)


@pytest.mark.parametrize("variant", [{}, custom("softmax")], ids=shown)
def test_padding_leaves_every_output_and_gradient_finite(variant):
    model = build(variant)
    mask = (torch.arange(9) >= 4)[None]
    logits = model(torch.randint(0, 31, (1, 9)), attention_mask_BT=mask)[0]
    logits.square().sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_mask_shows_real_keys_up_to_the_query_and_never_nothing():
    real = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    table = [
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1] * 4],
    ]
    whole, last = (Mask(n_queries, 4, real.device, real_BS=real).dense()[:, 0].int() for n_queries in (4, 2))
    assert whole.tolist() == table
    assert last.tolist() == [rows[2:] for rows in table]


LENGTH_FREE = [v for v in VARIANTS if v.get("attn_seq_scalar") in (None, "none")]
"""All but those whose attention depends, by definition, on how many keys a call sees."""


@pytest.mark.parametrize("kind", ["static", "growing"])
@pytest.mark.parametrize("variant", LENGTH_FREE, ids=shown)
def test_decoding_with_a_cache_gives_the_same_logits(variant, kind):
    model = build(variant)
    ids = torch.randint(0, 31, (2, 13))
    with torch.no_grad():
        whole = model(ids)[0]
        past = model.new_cache(2, 13) if kind == "static" else None
        pieces = []
        for start, stop in ((0, 6), (6, 7), (7, 11), (11, 12), (12, 13)):
            logits, _, past = model(ids[:, start:stop], past, use_cache=True)
            pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", LENGTH_FREE, ids=shown)
def test_padding_on_either_side_changes_nothing(variant):
    model = build(variant)
    ids = torch.randint(0, 31, (1, 8))
    left = torch.cat((torch.zeros(1, 5, dtype=torch.long), ids), 1)
    right = torch.cat((ids, torch.zeros(1, 5, dtype=torch.long)), 1)
    with torch.no_grad():
        alone = model(ids)[0]
        padded_left = model(left, attention_mask_BT=(torch.arange(13) >= 5)[None].long())[0][:, 5:]
        padded_right = model(right, attention_mask_BT=(torch.arange(13) < 8)[None].long())[0][:, :8]
    torch.testing.assert_close(padded_left, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded_right, alone, atol=1e-5, rtol=1e-5)


def test_a_padded_batch_decodes_with_a_cache_as_each_row_alone():
    model = build({"qk_norm": True})
    short, long = torch.randint(0, 31, (1, 5)), torch.randint(0, 31, (1, 9))
    batch = torch.cat((torch.cat((torch.zeros(1, 4, dtype=torch.long), short), 1), long))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4] = False
    with torch.no_grad():
        past = model(batch[:, :8], use_cache=True, attention_mask_BT=mask[:, :8])[2]
        last = model(batch[:, 8:], past, attention_mask_BT=mask)[0][:, -1]
        torch.testing.assert_close(last[:1], model(short)[0][:, -1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(last[1:], model(long)[0][:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS, ids=shown)
def test_every_parameter_gets_a_gradient_and_none_is_nan(variant):
    model = build(variant)
    model(torch.randint(0, 31, (2, 9)))[0].logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0 or name.endswith("bias"), name
