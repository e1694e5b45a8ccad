"""A tiny Llama with the same weights in transformers and here, as an independent reference of generation."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from open_lm.model import create_model
from open_lm.model.config import ModelConfig

VOCAB, CONTEXT, WIDTH, LAYERS, HEADS = 61, 48, 32, 2, 4


@pytest.fixture(scope="session")
def llama():
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5, initializer_range=0.6,
            tie_word_embeddings=False, eos_token_id=None, bos_token_id=None, pad_token_id=0,
        )
    ).eval()  # fmt: skip


@pytest.fixture(scope="session")
def model(llama):
    """The same weights here; `rotary` turns halves of a head as transformers does, so nothing is permuted."""
    ours = create_model(
        ModelConfig(
            hidden_dim=WIDTH, n_layers=LAYERS, n_heads=HEADS, seq_len=CONTEXT, vocab_size=VOCAB, model_norm="rms_norm"
        )
    )
    theirs = llama.state_dict()
    weights = {name: theirs[f"model.{name}"] for name in ["norm.weight"]}
    weights |= {"tok_embeddings.weight": theirs["model.embed_tokens.weight"], "output.weight": theirs["lm_head.weight"]}
    for n in range(LAYERS):
        t, o = f"model.layers.{n}.", f"layers.{n}."
        weights[o + "attention.in_proj.weight"] = torch.cat(
            [theirs[f"{t}self_attn.{x}_proj.weight"] for x in ("q", "k", "v")]
        )
        weights[o + "attention.out_proj.weight"] = theirs[t + "self_attn.o_proj.weight"]
        weights[o + "feed_forward.w12.weight"] = torch.cat(
            [theirs[t + "mlp.gate_proj.weight"], theirs[t + "mlp.up_proj.weight"]]
        )
        weights[o + "feed_forward.w3.weight"] = theirs[t + "mlp.down_proj.weight"]
        weights[o + "attention_norm.weight"] = theirs[t + "input_layernorm.weight"]
        weights[o + "ffn_norm.weight"] = theirs[t + "post_attention_layernorm.weight"]
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith("inv_freq") for name in missing)
    return ours.eval()


@pytest.fixture
def prompts():
    """Three prompts of different lengths."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in (3, 9, 6)]
