"""How architectures that transformers knows map to ours: Llama, OLMo and GPT-NeoX configs and weights, both ways.

Pure: dicts in, dicts out. Shapes: H heads, G heads of keys and values, K head width, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from open_lm.errors import CheckpointError
from open_lm.model.config import ModelConfig
from open_lm.model.feed_forward import gated_width

Weights = dict[str, Tensor]

LAYER_NAMES = {
    "self_attn.o_proj.weight": "attention.out_proj.weight",
    "mlp.down_proj.weight": "feed_forward.w3.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}
"""Weights of a Llama or OLMo layer that are ours under another name; the others are packed."""

TOP_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}


def native_family(config: ModelConfig) -> str | None:
    """The `model_type` of transformers that computes exactly what `config` does; None when there is none."""
    gated = config.ffn_type in ("swiglu", "swiglu_torch")
    turned = config.positional_embedding_type in ("rotary", "llama_rotary")
    plain = not config.qk_norm and not config.post_embed_norm and config.attn_name != "custom_attn"
    if not (gated and turned and plain and config.moe_freq == 0):
        return None
    if config.model_norm == "rms_norm":
        return "llama"
    fits_olmo = config.norm_eps == 1e-5 and config.hidden_dim % config.n_heads == 0  # both are fixed in OLMo's code
    return "olmo" if config.model_norm == "no_wb_layer_norm" and fits_olmo else None


def to_native(config: ModelConfig, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], Weights]:
    """The config and weights of transformers' own class for a model that `native_family` knows."""
    values = {
        "model_type": native_family(config),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_dim,
        "intermediate_size": config.ffn_dim or gated_width(config.hidden_dim),
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.seq_len,
        "rope_theta": config.rotary_base,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.weight_tying,
    }
    if values["model_type"] == "olmo":
        del values["rms_norm_eps"], values["head_dim"]
    out = {theirs: weights[ours] for theirs, ours in TOP_NAMES.items() if ours in weights}
    for layer in range(config.n_layers):
        out |= _layer_to_native(config, weights, f"layers.{layer}.", f"model.layers.{layer}.")
    return values, out


def _layer_to_native(config: ModelConfig, weights: Mapping[str, Tensor], ours: str, theirs: str) -> Weights:
    arranged: Callable = pairs_to_halves if config.positional_embedding_type == "llama_rotary" else _unchanged
    widths = [config.n_heads * config.head_dim, *[config.kv_heads * config.head_dim] * 2]
    q, k, v = weights[ours + "attention.in_proj.weight"].split(widths)
    gate, up = weights[ours + "feed_forward.w12.weight"].chunk(2)
    packed = {
        "self_attn.q_proj.weight": arranged(q, config.head_dim),
        "self_attn.k_proj.weight": arranged(k, config.head_dim),
        "self_attn.v_proj.weight": v,
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
    }
    named = {name: weights[ours + other] for name, other in LAYER_NAMES.items() if ours + other in weights}
    return {theirs + name: tensor.contiguous() for name, tensor in (packed | named).items()}


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
    _require(values, "hidden_act", "silu")
    for name in ("attention_bias", "mlp_bias"):
        _require(values, name, False)
    return _from_llama_like(values, weights, model_norm="rms_norm", norm_eps=float(values.get("rms_norm_eps", 1e-6)))


def _from_olmo(values: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[ModelConfig, Weights]:
    _require(values, "hidden_act", "silu")
    _require(values, "attention_bias", False)
    _require(values, "clip_qkv", None)
    return _from_llama_like(values, weights, model_norm="no_wb_layer_norm")


def _from_llama_like(
    values: Mapping[str, Any], weights: Mapping[str, Tensor], **norm: Any
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
        **norm,
    )
    out = {ours: weights[theirs] for theirs, ours in TOP_NAMES.items() if theirs in weights}
    for layer in range(config.n_layers):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        out |= {
            ours + name: weights[theirs + other] for other, name in LAYER_NAMES.items() if theirs + other in weights
        }
        qkv = [weights[f"{theirs}self_attn.{part}_proj.weight"] for part in "qkv"]
        out[ours + "attention.in_proj.weight"] = torch.cat(qkv)
        gate_up = [weights[f"{theirs}mlp.{part}_proj.weight"] for part in ("gate", "up")]
        out[ours + "feed_forward.w12.weight"] = torch.cat(gate_up)
    return config, out


def _from_gpt_neox(values: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[ModelConfig, Weights]:
    rope = values.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor", values.get("rotary_pct", 1.0))
    problems = [] if share == 1 else [f"rotary_pct {share} (ours turns all channels)"]
    if values.get("use_parallel_residual", True):
        problems.append("use_parallel_residual (our blocks run one after the other)")
    if values.get("hidden_act", "gelu") != "gelu":
        problems.append(f"hidden_act {values['hidden_act']!r}")
    if values["intermediate_size"] != 4 * values["hidden_size"]:
        problems.append("an intermediate_size other than 4 times hidden_size")
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
    )
    out = {"tok_embeddings.weight": weights["gpt_neox.embed_in.weight"], "output.weight": weights["embed_out.weight"]}
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


FAMILIES = {"llama": _from_llama, "olmo": _from_olmo, "gpt_neox": _from_gpt_neox}


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


def _unchanged(weight: Tensor, head_dim: int) -> Tensor:
    return weight


def _fewer(n_kv_heads: int | None, n_heads: int) -> int | None:
    return None if n_kv_heads in (None, n_heads) else n_kv_heads


def _require(values: Mapping[str, Any], name: str, expected: Any) -> None:
    if values.get(name, expected) != expected:
        raise CheckpointError(f"{name} {values[name]!r}: ours has {expected!r} alone. Train it with --hf-model.")
