"""Transformers models from ours: its own class where it has the architecture, else ours, shipped with the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_lm.model.architecture import MambaConfig, ModelConfig
from open_lm.model.hf_config import HFConfig
from open_lm.weights.file import to_openlm
from open_lm.weights.to_hf import native_family, to_native


def to_transformers(config: ModelConfig | MambaConfig | HFConfig, weights: dict[str, Tensor]) -> Any:
    """A PreTrainedModel that shares `weights`, to be saved (its constants have no memory, so it cannot compute)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    build: Callable[[Any], Any] = AutoModelForCausalLM.from_config
    their_config: Any
    if isinstance(config, HFConfig):
        their_config = AutoConfig.for_model(**config.hf_config)
        named = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    elif isinstance(config, MambaConfig) or native_family(config):
        values, named = to_native(config, weights)
        their_config = AutoConfig.for_model(values.pop("model_type"), **values, bos_token_id=None, eos_token_id=None)
    else:
        from open_lm.hf import OpenLMConfig, OpenLMForCausalLM

        their_config, build, named = OpenLMConfig(**own_values(config)), OpenLMForCausalLM, own_names(config, weights)
    their_config.eos_token_id = their_config.pad_token_id = None
    with torch.device("meta"):
        model = build(their_config)
    model.load_state_dict(named, assign=True)
    model.tie_weights()
    return model


OWN_KEYS = (
    "n_layers", "n_heads", "seq_len", "vocab_size", "norm_eps", "rotary_base", "ffn_type", "ffn_dim",
    "positional_embedding_type", "post_embed_norm", "weight_tying", "attn_activation", "attn_seq_scalar",
    "attn_seq_scalar_alpha", "moe_freq", "moe_num_experts", "moe_top_k", "moe_expert_type", "moe_capacity_factor",
    "moe_loss_weight",
)  # fmt: skip
"""Keys of an architecture that OpenLMConfig spells alike."""


def own_values(config: ModelConfig) -> dict[str, Any]:
    """The keys of OpenLMConfig for an architecture of ours."""
    return {
        **{name: getattr(config, name) for name in OWN_KEYS},
        "dim": config.hidden_dim,
        "norm_type": config.model_norm,
        "apply_qk_norm": config.qk_norm,
        "n_kv_heads": config.kv_heads,
        "window": config.sliding_window,
        "attn_name": "custom_attn" if config.attn_name == "custom_attn" else "auto",
    }


def own_names(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names of OpenLM's published folders, each once."""
    if config.moe_expert_type == "megablocks":
        weights = to_openlm(weights)
    names = (name for name in weights if not name.endswith(".inv_freq") and "._ff_w" not in name)
    return {f"model.{name}": weights[name] for name in names}


def name_rotary_as_before(path: Path) -> None:
    """Also write the rotary's numbers under the names they had before transformers 5, which other programs read."""
    values = json.loads(path.read_text())
    rope = values.get("rope_parameters") or {}
    theta, share = rope.get("rope_theta"), rope.get("partial_rotary_factor")
    of_neox = values["model_type"] == "gpt_neox"
    old = {"rotary_emb_base": theta, "rotary_pct": share} if of_neox else {}
    old |= {"rope_theta": theta, "partial_rotary_factor": share}
    added = {name: value for name, value in old.items() if value is not None and name not in values}
    if added:
        path.write_text(json.dumps(values | added, indent=2, sort_keys=True) + "\n")


def save(model: Any, folder: Path) -> None:
    """Write config and sharded safetensors; save_pretrained adds the files of our own class where it is the class."""
    model.save_pretrained(folder, max_shard_size="5GB")
    name_rotary_as_before(folder / "config.json")
    for file in folder.glob("*.safetensors"):  # safetensors makes them readable by their owner alone
        file.chmod((folder / "config.json").stat().st_mode)
