"""Tiny models of every kind that can be exported, and checkpoints of them."""

import torch

from open_lm.model import create_model
from open_lm.model.config import ModelConfig

BASE = {"hidden_dim": 32, "n_layers": 2, "n_heads": 4, "seq_len": 40, "vocab_size": 53}
CONFIGS = {
    "llama": {"model_norm": "rms_norm"},
    "llama_pairs_gqa": {"model_norm": "rms_norm", "positional_embedding_type": "llama_rotary", "n_kv_heads": 2},
    "llama_tied_wide": {"model_norm": "rms_norm", "weight_tying": True, "ffn_dim": 48, "rotary_base": 500.0},
    "mistral": {"model_norm": "rms_norm", "n_kv_heads": 2, "sliding_window": 7},
    "olmo": {"model_norm": "no_wb_layer_norm"},
    "stablelm": {},
    "stablelm_gains": {
        "model_norm": "gain_only_lp_layer_norm", "ffn_type": "swiglu_torch", "n_kv_heads": 2,
        "positional_embedding_type": "llama_rotary",
    },
    "gpt_neox": {"ffn_type": "gelu", "model_norm": "lp_layer_norm", "positional_embedding_type": "llama_rotary"},
    "olmoe": {
        "model_norm": "rms_norm", "qk_norm": True, "moe_freq": 1, "moe_num_experts": 4, "ffn_dim": 24,
        "positional_embedding_type": "llama_rotary",
    },
    "mamba": {"d_model": 24, "n_layer": 2, "vocab_size": 53, "seq_len": 40},
    "own_experts": {"moe_freq": 2, "moe_num_experts": 3, "ffn_type": "gemma_geglu"},
    "own_megablocks": {"moe_freq": 2, "moe_num_experts": 4, "moe_top_k": 1, "moe_expert_type": "megablocks"},
    "own_published": {
        "model_norm": "gain_only_layer_norm", "qk_norm": True, "positional_embedding_type": "head_rotary",
    },
    "own_gelu": {"model_norm": "lp_layer_norm", "ffn_type": "gelu", "n_kv_heads": 2},
    "own_geglu": {
        "ffn_type": "gemma_geglu", "positional_embedding_type": "none", "post_embed_norm": True, "weight_tying": True,
        "n_kv_heads": 1,
    },
    "own_pairs": {"model_norm": "rms_norm", "qk_norm": True, "positional_embedding_type": "llama_rotary"},
    "own_custom": {
        "attn_name": "custom_attn", "attn_activation": "relu_squared", "attn_seq_scalar": "max",
        "attn_seq_scalar_alpha": 1.0,
    },
    "own_uneven": {"hidden_dim": 34},
    "own_window": {"sliding_window": 7, "ffn_type": "gemma_geglu"},
}  # fmt: skip


def make_model(name, **more):
    torch.manual_seed(1)
    changes = {**CONFIGS[name], **more}
    model = create_model(ModelConfig.from_dict(changes if "d_model" in changes else {**BASE, **changes}))
    with torch.no_grad():  # norms and biases that are not 1 and 0, and logits far from each other
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        (model.lm_head if name == "mamba" else model.output).weight.mul_(3)
    return model.eval()


def save_checkpoint(model, path, **facts):
    config = {"model": model.config.to_dict(), "flags": {"lr": 0.003, "train_data": ["shards/a.tar"]}}
    head = {"epoch": 1, "name": "tiny", "step": 7, "tokens": 12_000, "config": config}
    torch.save({**head, "state_dict": model.state_dict(), **facts}, path)
    return str(path)
