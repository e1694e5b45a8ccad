"""Our architectures in transformers' terms: the class that computes the same, its config and weights.

Pure: dicts in, dicts out; `from_hf.py` goes the other way. Shapes: H heads, K head width, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from open_lm.model.architecture import MambaConfig, ModelConfig
from open_lm.model.feed_forward import gated_width
from open_lm.weights.from_hf import LAYER_NAMES, TOP_NAMES, Weights, pairs_to_halves


def native_family(config: ModelConfig | MambaConfig) -> str | None:
    """The `model_type` of transformers that computes exactly what `config` does; None when there is none."""
    if isinstance(config, MambaConfig):
        return "mamba"
    turned = config.positional_embedding_type in ("rotary", "llama_rotary")
    if not turned or config.post_embed_norm or config.attn_name == "custom_attn":
        return None
    gated, whole_heads = config.ffn_type in ("swiglu", "swiglu_torch"), config.hidden_dim % config.n_heads == 0
    if config.moe_freq:
        all_layers = config.moe_freq == 1 and config.moe_expert_type == "ffn" and config.sliding_window is None
        is_olmoe = gated and whole_heads and config.qk_norm and config.model_norm == "rms_norm"
        return "olmoe" if is_olmoe and all_layers else None
    if config.qk_norm:  # others normalise each head by itself, or after the layer
        return None
    if config.model_norm == "rms_norm":
        family = "llama" if config.sliding_window is None else "mistral"
        return family if gated else None
    if config.sliding_window is not None:
        return None
    if not whole_heads:
        return None
    if config.model_norm == "no_wb_layer_norm":
        return "olmo" if gated and config.norm_eps == 1e-5 else None  # OLMo's code has no other
    if gated:
        return "stablelm"
    return "gpt_neox" if config.ffn_type == "gelu" and config.kv_heads == config.n_heads else None


def to_native(config: ModelConfig | MambaConfig, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], Weights]:
    """The config and weights of transformers' own class for a model that `native_family` knows."""
    if isinstance(config, MambaConfig):
        return _mamba_values(config), {name.replace(".embedding.", ".embeddings."): w for name, w in weights.items()}
    family = native_family(config)
    assert family is not None, "native_family knows no class for this architecture"
    if family == "gpt_neox":
        return _neox(config, weights)
    out = {theirs: weights[ours] for theirs, ours in TOP_NAMES.items() if ours in weights}
    for layer in range(config.n_layers):
        out |= _layer(config, weights, f"layers.{layer}.", f"model.layers.{layer}.")
    if family == "stablelm":
        out |= _norm_biases(weights, {"model.norm": "norm"})
    return {"model_type": family, **_values(config, family)}, out


def _values(config: ModelConfig, family: str) -> dict[str, Any]:
    """The keys of config.json of the Llama-like families."""
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_dim,
        "intermediate_size": config.ffn_dim or gated_width(config.hidden_dim),
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.seq_len,
        "rope_theta": config.rotary_base,
        "tie_word_embeddings": config.weight_tying,
    }
    own: dict[str, dict[str, Any]] = {
        "llama": {"head_dim": config.head_dim, "rms_norm_eps": config.norm_eps},
        "mistral": {
            "head_dim": config.head_dim,
            "rms_norm_eps": config.norm_eps,
            "sliding_window": config.sliding_window,
        },
        "olmo": {},
        "olmoe": {
            "rms_norm_eps": config.norm_eps,
            "num_experts": config.moe_num_experts,
            "num_experts_per_tok": config.moe_top_k,
            "norm_topk_prob": False,
            "router_aux_loss_coef": config.moe_loss_weight,
        },
        "stablelm": {"layer_norm_eps": config.norm_eps, "partial_rotary_factor": 1.0},
    }
    return common | own[family]


def _layer(config: ModelConfig, weights: Mapping[str, Tensor], ours: str, theirs: str) -> Weights:
    """One layer of the Llama-like families."""
    arranged = _arranged(config)
    q, k, v = weights[ours + "attention.in_proj.weight"].split(_widths(config))
    named = {name: weights[ours + other] for name, other in LAYER_NAMES.items() if ours + other in weights}
    named |= {
        "self_attn.q_proj.weight": arranged(q, config.head_dim),
        "self_attn.k_proj.weight": arranged(k, config.head_dim),
        "self_attn.v_proj.weight": v,
    }
    if config.qk_norm:
        for norm in ("q_norm", "k_norm"):
            named[f"self_attn.{norm}.weight"] = arranged(weights[f"{ours}attention.{norm}.weight"], config.head_dim)
    if config.moe_freq:
        named["mlp.gate.weight"] = weights[ours + "feed_forward.router.weight"]
        named["mlp.experts.gate_up_proj"] = weights[ours + "feed_forward.experts.w12"]
        named["mlp.experts.down_proj"] = weights[ours + "feed_forward.experts.w3"]
    else:
        gate, up = weights[ours + "feed_forward.w12.weight"].chunk(2)
        named |= {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up}
    if native_family(config) == "stablelm":
        norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
        named |= _norm_biases(weights, {a: ours + b for a, b in norms.items()})
    return {theirs + name: tensor.contiguous() for name, tensor in named.items()}


def _norm_biases(weights: Mapping[str, Tensor], norms: Mapping[str, str]) -> Weights:
    """The biases of norms by their new names; zeros where ours have only a gain."""
    return {
        f"{theirs}.bias": weights.get(f"{ours}.bias", torch.zeros_like(weights[f"{ours}.weight"]))
        for theirs, ours in norms.items()
    }


def _neox(config: ModelConfig, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], Weights]:
    """GPT-NeoX: the biases it has beside ours are zero."""
    values = {
        "model_type": "gpt_neox",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_dim,
        "intermediate_size": config.ffn_dim or 4 * config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "max_position_embeddings": config.seq_len,
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": False,
        "attention_bias": False,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": config.rotary_base, "partial_rotary_factor": 1.0,
        },
        "tie_word_embeddings": config.weight_tying,
    }  # fmt: skip
    norms = {"gpt_neox.final_layer_norm": "norm"}
    out = {"gpt_neox.embed_in.weight": weights["tok_embeddings.weight"], "lm_head.weight": weights["output.weight"]}
    for layer in range(config.n_layers):
        ours, theirs = f"layers.{layer}.", f"gpt_neox.layers.{layer}."
        norms[theirs + "input_layernorm"] = ours + "attention_norm"
        norms[theirs + "post_attention_layernorm"] = ours + "ffn_norm"
        out |= _neox_layer(config, weights, ours, theirs)
    out |= {f"{theirs}.weight": weights[f"{ours}.weight"] for theirs, ours in norms.items()}
    return values, out | _norm_biases(weights, norms)


def _neox_layer(config: ModelConfig, weights: Mapping[str, Tensor], ours: str, theirs: str) -> Weights:
    arranged = _arranged(config)
    q, k, v = weights[ours + "attention.in_proj.weight"].split(_widths(config))
    by_head = [x.unflatten(0, (config.n_heads, config.head_dim)) for x in (arranged(q, config.head_dim),
               arranged(k, config.head_dim), v)]  # fmt: skip
    up, down = weights[ours + "feed_forward.0.weight"], weights[ours + "feed_forward.2.weight"]
    return {
        theirs + "attention.query_key_value.weight": torch.stack(by_head, dim=1).flatten(0, 2),
        theirs + "attention.dense.weight": weights[ours + "attention.out_proj.weight"],
        theirs + "mlp.dense_h_to_4h.weight": up,
        theirs + "mlp.dense_h_to_4h.bias": up.new_zeros(len(up)),
        theirs + "mlp.dense_4h_to_h.weight": down,
        theirs + "mlp.dense_4h_to_h.bias": down.new_zeros(len(down)),
    }


def _mamba_values(config: MambaConfig) -> dict[str, Any]:
    return {
        "model_type": "mamba",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer,
        "state_size": config.d_state,
        "conv_kernel": config.d_conv,
        "expand": config.expand,
        "time_step_rank": config.step_rank,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.seq_len,
    }


def _widths(config: ModelConfig) -> list[int]:
    return [config.n_heads * config.head_dim, *[config.kv_heads * config.head_dim] * 2]


def _arranged(config: ModelConfig) -> Callable[[Tensor, int], Tensor]:
    """Order of the rows of q and k for rotary over halves, as transformers has it."""
    return pairs_to_halves if config.positional_embedding_type == "llama_rotary" else lambda weight, head_dim: weight
