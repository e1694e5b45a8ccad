"""Import from transformers: configs and weights of Llama, Mistral, OLMo, OLMoE, StableLM, GPT-NeoX and Mamba.

Pure: dicts in, dicts out; `to_hf.py` goes the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from open_lm.errors import CheckpointError
from open_lm.model.architecture import MambaConfig, ModelConfig
from open_lm.model.feed_forward import gated_width

Weights = dict[str, Tensor]

LAYER_NAMES = {
    "self_attn.o_proj.weight": "attention.out_proj.weight",
    "mlp.down_proj.weight": "feed_forward.w3.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}
"""Weights of a Llama-like layer that are ours under another name; the others are packed."""

TOP_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}


def from_native(values: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[ModelConfig, Weights]:
    """Our config and weights of a model given as transformers' config.json and weights.

    Raises:
        CheckpointError: it has something that our architectures do not; named.
    """
    family = values.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(
            f"model_type {family!r}: cannot be expressed here. Known are {', '.join(FAMILIES)}; train any other with "
            "--hf-model."
        )
    return FAMILIES[family](values, weights)


def _from_llama(values: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[ModelConfig, Weights]:
    _require(values, hidden_act="silu", attention_bias=False, mlp_bias=False)
    return _from_llama_like(values, weights, model_norm="rms_norm", norm_eps=float(values.get("rms_norm_eps", 1e-6)))


def _from_mistral(values: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[ModelConfig, Weights]:
    _require(values, hidden_act="silu")
    eps = float(values.get("rms_norm_eps", 1e-6))
    window = values.get("sliding_window", 4096)  # what transformers takes where a file is silent
    return _from_llama_like(values, weights, model_norm="rms_norm", norm_eps=eps, sliding_window=window)


def _from_olmo(values: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[ModelConfig, Weights]:
    _require(values, hidden_act="silu", attention_bias=False, clip_qkv=None)
    return _from_llama_like(values, weights, model_norm="no_wb_layer_norm")


def _from_olmoe(values: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[ModelConfig, Weights]:
    _require(values, hidden_act="silu", attention_bias=False, clip_qkv=None, norm_topk_prob=False)
    experts = {
        "qk_norm": True,
        "moe_freq": 1,
        "moe_num_experts": values["num_experts"],
        "moe_top_k": values["num_experts_per_tok"],
        "moe_capacity_factor": 0.0,
        "moe_loss_weight": float(values.get("router_aux_loss_coef", 0.01)),
    }
    eps = float(values.get("rms_norm_eps", 1e-5))
    return _from_llama_like(values, weights, model_norm="rms_norm", norm_eps=eps, **experts)


def _from_stablelm(values: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[ModelConfig, Weights]:
    _require(values, hidden_act="silu", use_qkv_bias=False, qk_layernorm=False, use_parallel_residual=False)
    _require_whole_rotary(values, values.get("partial_rotary_factor", 0.25))
    has_bias = any(bool(w.any()) for name, w in weights.items() if name.endswith("norm.bias"))
    kind = "default_layer_norm" if has_bias else "gain_only_layer_norm"
    eps = float(values.get("layer_norm_eps", 1e-5))
    config, out = _from_llama_like(values, weights, model_norm=kind, norm_eps=eps)
    if has_bias:
        out["norm.bias"] = weights["model.norm.bias"]
        norms = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
        for layer in range(config.n_layers):
            out |= {f"layers.{layer}.{a}.bias": weights[f"model.layers.{layer}.{b}.bias"] for a, b in norms.items()}
    return config, out


def _from_llama_like(
    values: Mapping[str, Any], weights: Mapping[str, Tensor], **others: Any
) -> tuple[ModelConfig, Weights]:
    n_heads, dim = values["num_attention_heads"], values["hidden_size"]
    head_dim = values.get("head_dim") or dim // n_heads
    if head_dim != dim // n_heads:
        raise CheckpointError(f"head_dim {head_dim}: ours is hidden_size // num_attention_heads = {dim // n_heads}.")
    config = ModelConfig(
        hidden_dim=dim,
        n_layers=values["num_hidden_layers"],
        n_heads=n_heads,
        n_kv_heads=_fewer(values.get("num_key_value_heads"), n_heads),
        seq_len=values["max_position_embeddings"],
        vocab_size=values["vocab_size"],
        weight_tying=bool(values.get("tie_word_embeddings", False)),
        rotary_base=rotary_base(values),
        ffn_dim=None if values["intermediate_size"] == gated_width(dim) else values["intermediate_size"],
        **others,
    )
    out = {ours: weights[theirs] for theirs, ours in TOP_NAMES.items() if theirs in weights}
    for layer in range(config.n_layers):
        out |= _llama_layer(config, weights, f"layers.{layer}.", f"model.layers.{layer}.")
    return config, out


def _llama_layer(config: ModelConfig, weights: Mapping[str, Tensor], ours: str, theirs: str) -> Weights:
    out = {ours + name: weights[theirs + other] for other, name in LAYER_NAMES.items() if theirs + other in weights}
    qkv = [weights[f"{theirs}self_attn.{part}_proj.weight"] for part in "qkv"]
    out[ours + "attention.in_proj.weight"] = torch.cat(qkv)
    if config.qk_norm:
        out |= {f"{ours}attention.{n}_norm.weight": weights[f"{theirs}self_attn.{n}_norm.weight"] for n in "qk"}
    if config.moe_freq:
        return out | _experts(config, weights, f"{ours}feed_forward.", f"{theirs}mlp.")
    gate_up = [weights[f"{theirs}mlp.{part}_proj.weight"] for part in ("gate", "up")]
    out[ours + "feed_forward.w12.weight"] = torch.cat(gate_up)
    return out


def _experts(config: ModelConfig, weights: Mapping[str, Tensor], ours: str, theirs: str) -> Weights:
    """The stacked experts of a layer; files hold them one by one, or stacked already."""
    if theirs + "experts.gate_up_proj" in weights:
        w12, w3 = weights[theirs + "experts.gate_up_proj"], weights[theirs + "experts.down_proj"]
    else:
        each = [f"{theirs}experts.{e}." for e in range(config.moe_num_experts or 0)]
        gate_up = [[weights[f"{e}{part}_proj.weight"] for part in ("gate", "up")] for e in each]
        w12 = torch.stack([torch.cat(pair) for pair in gate_up])
        w3 = torch.stack([weights[e + "down_proj.weight"] for e in each])
    return {f"{ours}router.weight": weights[theirs + "gate.weight"], f"{ours}experts.w12": w12, f"{ours}experts.w3": w3}


def _from_mamba(values: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[MambaConfig, Weights]:
    _require(values, hidden_act="silu", use_bias=False, use_conv_bias=True)
    config = MambaConfig(
        d_model=values["hidden_size"],
        n_layer=values["num_hidden_layers"],
        vocab_size=values["vocab_size"],
        seq_len=values.get("max_position_embeddings", 2048),  # the architecture knows no end; it was trained on 2048
        d_state=values.get("state_size", 16),
        d_conv=values.get("conv_kernel", 4),
        expand=values.get("expand", 2),
        dt_rank=values.get("time_step_rank"),
        tie_embeddings=bool(values.get("tie_word_embeddings", True)),
        norm_eps=float(values.get("layer_norm_epsilon", 1e-5)),
    )
    return config, {name.replace(".embeddings.", ".embedding."): tensor for name, tensor in weights.items()}


def _from_gpt_neox(values: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[ModelConfig, Weights]:
    share = _rotary_share(values, values.get("rotary_pct", 1.0))
    problems = [] if share == 1 else [f"rotary_pct {share} (ours turns all channels)"]
    if values.get("use_parallel_residual", True):
        problems.append("use_parallel_residual (our blocks run one after the other)")
    if values.get("hidden_act", "gelu") != "gelu":
        problems.append(f"hidden_act {values['hidden_act']!r}")
    biased = [n for n, w in weights.items() if n.endswith(("attention.query_key_value.bias", "dense.bias",
              "dense_h_to_4h.bias", "dense_4h_to_h.bias")) and w.any()]  # fmt: skip
    if biased:
        problems.append(f"biases in attention or feed-forward ({biased[0]} is not zero)")
    if problems:
        raise CheckpointError(
            f"this GPT-NeoX cannot be expressed here: {'; '.join(problems)}. Train it with --hf-model."
        )
    config = ModelConfig(
        hidden_dim=values["hidden_size"],
        n_layers=values["num_hidden_layers"],
        n_heads=values["num_attention_heads"],
        seq_len=values["max_position_embeddings"],
        vocab_size=values["vocab_size"],
        weight_tying=bool(values.get("tie_word_embeddings", False)),
        norm_eps=float(values.get("layer_norm_eps", 1e-5)),
        rotary_base=rotary_base(values),
        ffn_type="gelu",
        ffn_dim=None if values["intermediate_size"] == 4 * values["hidden_size"] else values["intermediate_size"],
    )
    embedding = weights["gpt_neox.embed_in.weight"]
    heads = [weights[name] for name in ("embed_out.weight", "lm_head.weight") if name in weights]
    out = {"tok_embeddings.weight": embedding, "output.weight": heads[0] if heads else embedding}
    out |= {f"norm.{kind}": weights[f"gpt_neox.final_layer_norm.{kind}"] for kind in ("weight", "bias")}
    for layer in range(config.n_layers):
        out |= _neox_layer(config, weights, f"layers.{layer}.", f"gpt_neox.layers.{layer}.")
    return config, out


def _neox_layer(config: ModelConfig, weights: Mapping[str, Tensor], ours: str, theirs: str) -> Weights:
    packed = weights[theirs + "attention.query_key_value.weight"]  # head by head, q k v within each
    in_proj = packed.unflatten(0, (config.n_heads, 3, config.head_dim)).transpose(0, 1).flatten(0, 2)
    norms = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    return {
        ours + "attention.in_proj.weight": in_proj.contiguous(),
        ours + "attention.out_proj.weight": weights[theirs + "attention.dense.weight"],
        ours + "feed_forward.0.weight": weights[theirs + "mlp.dense_h_to_4h.weight"],
        ours + "feed_forward.2.weight": weights[theirs + "mlp.dense_4h_to_h.weight"],
        **{
            f"{ours}{a}.{kind}": weights[f"{theirs}{b}.{kind}"] for a, b in norms.items() for kind in ("weight", "bias")
        },
    }


FAMILIES: dict[str, Callable[..., tuple[Any, Weights]]] = {
    "llama": _from_llama,
    "mistral": _from_mistral,
    "olmo": _from_olmo,
    "olmoe": _from_olmoe,
    "stablelm": _from_stablelm,
    "gpt_neox": _from_gpt_neox,
    "mamba": _from_mamba,
}


def rotary_base(values: Mapping[str, Any]) -> float:
    """The base of the rotary angles.

    Raises:
        CheckpointError: the angles are stretched, which ours are not.
    """
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"rope_scaling {kind!r}: our rotary has no such stretching. Train it with --hf-model.")
    return float(rope.get("rope_theta", values.get("rope_theta", values.get("rotary_emb_base", 10_000.0))))


def pairs_to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a q or k projection for adjacent-pair rotary, reordered for half-split rotary with the same result."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _fewer(n_kv_heads: int | None, n_heads: int) -> int | None:
    return None if n_kv_heads in (None, n_heads) else n_kv_heads


def _require(values: Mapping[str, Any], **expected: Any) -> None:
    for name, ours in expected.items():
        if values.get(name, ours) != ours:
            raise CheckpointError(f"{name} {values[name]!r}: ours has {ours!r} alone. Train it with --hf-model.")


def _rotary_share(values: Mapping[str, Any], before: float) -> float:
    """The share of a head's channels that is turned; `before` is where older files have it."""
    return (values.get("rope_parameters") or {}).get("partial_rotary_factor", before)


def _require_whole_rotary(values: Mapping[str, Any], before: float) -> None:
    share = _rotary_share(values, before)
    if share != 1:
        raise CheckpointError(f"partial_rotary_factor {share}: ours turns all channels. Train it with --hf-model.")
