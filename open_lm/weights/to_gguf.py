"""GGUF architectures: which one of llama.cpp computes the same as ours, its metadata, and its names of our weights.

Pure: a config and a dict of weights in, metadata and entries out. Shapes: H heads, K head width, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from open_lm.errors import ConfigError
from open_lm.model.architecture import MambaConfig, ModelConfig
from open_lm.model.feed_forward import default_width
from open_lm.weights.gguf_file import BLOCK, Entry
from open_lm.weights.to_hf import native_family, pairs_to_halves

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "olmo": "olmo", "olmoe": "olmoe", "stablelm": "stablelm",
    "gpt_neox": "gptneox", "mamba": "mamba",
}  # fmt: skip
"""transformers' families and the architecture of llama.cpp that computes the same."""

TURNS_PAIRS = {"llama", "olmo"}
"""Architectures whose rotary turns adjacent channels; the others turn the first half with the second."""

FILE_TYPES = {"float32": 0, "float16": 1, "q8_0": 7, "bfloat16": 32}
"""llama.cpp's number for the type of most tensors."""

Parts = dict[str, Callable[[], Tensor]]


def to_gguf(config: Any, weights: Mapping[str, Tensor], dtype: str) -> tuple[dict[str, Any], list[Entry]]:
    """The metadata (without a tokenizer's) and the tensors of the file.

    Raises:
        ConfigError: llama.cpp has no architecture that computes the same.
    """
    family = native_family(config) if isinstance(config, ModelConfig | MambaConfig) else None
    if family not in ARCHITECTURES:
        raise ConfigError(
            "--to gguf: llama.cpp has no architecture that computes what this model does (it has Llama's, OLMo's, "
            "OLMoE's, StableLM's, GPT-NeoX' and Mamba's). Export it with --to hf."
        )
    name = ARCHITECTURES[family]
    if isinstance(config, MambaConfig):
        values, parts = mamba_values(config), mamba_parts(config, weights)
    else:
        refuse_narrow_window(config)
        values, parts = transformer_values(config, name), transformer_parts(config, name, weights)
    metadata = {"general.architecture": name, "general.file_type": FILE_TYPES[dtype]}
    entries = [entry(part, values_of, dtype) for part, values_of in parts.items()]
    return metadata | {f"{name}.{key}": value for key, value in values.items()}, entries


def refuse_narrow_window(config: ModelConfig) -> None:
    """Refuse a sliding window that a whole context would show.

    Raises:
        ConfigError: the window is shorter than the context.
    """
    if config.sliding_window is not None and config.sliding_window < config.seq_len:
        raise ConfigError(
            f"--to gguf: sliding_window {config.sliding_window} below the context of {config.seq_len}: llama.cpp's "
            "Llama sees all keys. Export it with --to hf."
        )


def entry(name: str, values: Callable[[], Tensor], dtype: str) -> Entry:
    """The tensor as `dtype`; vectors, routers and small tensors of a Mamba stay in fp32, as llama.cpp wants them."""
    shape = tuple(values().shape)
    small = len(shape) == 1 or "_norm" in name or "ffn_gate_inp" in name or name.split(".")[2:3] in KEPT_WHOLE
    kind = "float32" if small else dtype
    if kind == "q8_0" and shape[-1] % BLOCK:
        kind = "float16"
    return Entry(name, shape, kind, values)


KEPT_WHOLE = (["ssm_a"], ["ssm_conv1d"], ["ssm_d"])


def transformer_values(config: ModelConfig, name: str) -> dict[str, Any]:
    """The keys of a transformer, without the architecture before them."""
    eps = "attention.layer_norm_rms_epsilon" if name in ("llama", "olmoe") else "attention.layer_norm_epsilon"
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.seq_len,
        "embedding_length": config.hidden_dim,
        "block_count": config.n_layers,
        "feed_forward_length": config.ffn_dim or default_width(config.ffn_type, config.hidden_dim),
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rotary_base),
        eps: float(config.norm_eps),
    }
    if name in ("stablelm", "gptneox"):
        values["use_parallel_residual"] = False
    if config.moe_freq:
        values |= {"expert_count": config.moe_num_experts, "expert_used_count": config.moe_top_k}
    return values


def transformer_parts(config: ModelConfig, name: str, weights: Mapping[str, Tensor]) -> Parts:
    """The tensors of a transformer under llama.cpp's names."""
    parts: Parts = {"token_embd.weight": lambda: weights["tok_embeddings.weight"]}
    parts |= norm_parts(weights, "output_norm", "norm", name)
    if not config.weight_tying:
        parts["output.weight"] = lambda: weights["output.weight"]
    for layer in range(config.n_layers):
        ours, theirs = f"layers.{layer}.", f"blk.{layer}."
        parts |= norm_parts(weights, theirs + "attn_norm", ours + "attention_norm", name)
        parts |= norm_parts(weights, theirs + "ffn_norm", ours + "ffn_norm", name)
        parts |= attention_parts(config, name, weights, ours + "attention.", theirs)
        parts |= feed_forward_parts(config, weights, ours + "feed_forward.", theirs)
    return parts


def norm_parts(weights: Mapping[str, Tensor], theirs: str, ours: str, name: str) -> Parts:
    """Gain and bias of a norm: none for OLMo; a bias of zeros where llama.cpp wants one and ours has none."""
    if f"{ours}.weight" not in weights:
        return {}
    parts: Parts = {f"{theirs}.weight": lambda: weights[f"{ours}.weight"]}
    if name in ("stablelm", "gptneox"):
        parts[f"{theirs}.bias"] = lambda: weights.get(f"{ours}.bias", torch.zeros_like(weights[f"{ours}.weight"]))
    return parts


def attention_parts(config: ModelConfig, name: str, weights: Mapping[str, Tensor], ours: str, theirs: str) -> Parts:
    """Projections, q and k in the order of channels that this architecture's rotary turns."""
    turned = partial(arranged, config, name)
    widths = [config.n_heads * config.head_dim, *[config.kv_heads * config.head_dim] * 2]
    in_proj = weights[ours + "in_proj.weight"]
    parts: Parts = {theirs + "attn_output.weight": lambda: weights[ours + "out_proj.weight"]}
    if name == "gptneox":

        def packed() -> Tensor:
            q, k, v = in_proj.split(widths)
            return torch.cat((turned(q), turned(k), v))

        zeros = {"attn_qkv.bias": sum(widths), "attn_output.bias": config.hidden_dim}
        biases: Parts = {theirs + key: partial(torch.zeros, size) for key, size in zeros.items()}
        return parts | biases | {theirs + "attn_qkv.weight": packed}
    parts |= {
        theirs + "attn_q.weight": lambda: turned(in_proj.split(widths)[0]),
        theirs + "attn_k.weight": lambda: turned(in_proj.split(widths)[1]),
        theirs + "attn_v.weight": lambda: in_proj.split(widths)[2],
    }
    if config.qk_norm:
        parts[theirs + "attn_q_norm.weight"] = lambda: turned(weights[ours + "q_norm.weight"])
        parts[theirs + "attn_k_norm.weight"] = lambda: turned(weights[ours + "k_norm.weight"])
    return parts


def arranged(config: ModelConfig, name: str, weight: Tensor) -> Tensor:
    """Rows of q or k in the order that the architecture's rotary turns."""
    ours_in_pairs, theirs_in_pairs = config.positional_embedding_type == "llama_rotary", name in TURNS_PAIRS
    if ours_in_pairs == theirs_in_pairs:
        return weight
    return pairs_to_halves(weight, config.head_dim) if ours_in_pairs else halves_to_pairs(weight, config.head_dim)


def halves_to_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Rows for half-split rotary, reordered for adjacent-pair rotary with the same result."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def feed_forward_parts(config: ModelConfig, weights: Mapping[str, Tensor], ours: str, theirs: str) -> Parts:
    """The feed-forward layer, or the router and the experts."""
    if config.moe_freq:
        w12 = weights[ours + "experts.w12"]
        return {
            theirs + "ffn_gate_inp.weight": lambda: weights[ours + "router.weight"],
            theirs + "ffn_gate_exps.weight": lambda: w12.chunk(2, dim=1)[0],
            theirs + "ffn_up_exps.weight": lambda: w12.chunk(2, dim=1)[1],
            theirs + "ffn_down_exps.weight": lambda: weights[ours + "experts.w3"],
        }
    if config.ffn_type == "gelu":
        up, down = weights[ours + "0.weight"], weights[ours + "2.weight"]
        return {
            theirs + "ffn_up.weight": lambda: up,
            theirs + "ffn_up.bias": lambda: torch.zeros(len(up)),
            theirs + "ffn_down.weight": lambda: down,
            theirs + "ffn_down.bias": lambda: torch.zeros(len(down)),
        }
    w12 = weights[ours + "w12.weight"]
    return {
        theirs + "ffn_gate.weight": lambda: w12.chunk(2)[0],
        theirs + "ffn_up.weight": lambda: w12.chunk(2)[1],
        theirs + "ffn_down.weight": lambda: weights[ours + "w3.weight"],
    }


def mamba_values(config: MambaConfig) -> dict[str, Any]:
    """The keys of a Mamba."""
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.seq_len,
        "embedding_length": config.d_model,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "block_count": config.n_layer,
        "ssm.conv_kernel": config.d_conv,
        "ssm.inner_size": config.inner_dim,
        "ssm.state_size": config.d_state,
        "ssm.time_step_rank": config.step_rank,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
    }


MAMBA_NAMES = {
    "norm.weight": "attn_norm.weight", "mixer.in_proj.weight": "ssm_in.weight", "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight", "mixer.dt_proj.weight": "ssm_dt.weight", "mixer.dt_proj.bias": "ssm_dt.bias",
    "mixer.D": "ssm_d", "mixer.out_proj.weight": "ssm_out.weight",
}  # fmt: skip


def mamba_parts(config: MambaConfig, weights: Mapping[str, Tensor]) -> Parts:
    """The tensors of a Mamba under llama.cpp's names."""

    def given(name: str) -> Callable[[], Tensor]:
        return lambda: weights[name]

    parts = {
        "token_embd.weight": given("backbone.embedding.weight"),
        "output_norm.weight": given("backbone.norm_f.weight"),
    }
    if not config.tie_embeddings:
        parts["output.weight"] = given("lm_head.weight")
    for layer in range(config.n_layer):
        ours, theirs = f"backbone.layers.{layer}.", f"blk.{layer}."
        parts |= {theirs + name: given(ours + own) for own, name in MAMBA_NAMES.items()}
        parts[theirs + "ssm_conv1d.weight"] = partial(_squeezed, weights[ours + "mixer.conv1d.weight"])
        parts[theirs + "ssm_a"] = partial(_decay, weights[ours + "mixer.A_log"])
    return parts


def _squeezed(conv: Tensor) -> Tensor:
    return conv.squeeze(1)


def _decay(a_log: Tensor) -> Tensor:
    return -torch.exp(a_log.float())
