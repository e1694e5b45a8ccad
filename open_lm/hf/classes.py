"""Transformers models from ours: its own class where it has the architecture, else ours, shipped with the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_lm.model.architecture import MambaConfig, ModelConfig
from open_lm.model.feed_forward import default_width
from open_lm.model.hf_config import HFConfig
from open_lm.model.moe import expert_width
from open_lm.weights.to_hf import native_family, to_native

MODELING = Path(__file__).with_name("modeling_openlm.py")


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
        from open_lm.hf.modeling_openlm import OpenLMConfig, OpenLMForCausalLM

        named = {name: tensor for name, tensor in weights.items() if not name.endswith(".inv_freq")}
        their_config, build = OpenLMConfig(**own_values(config)), OpenLMForCausalLM
    their_config.eos_token_id = their_config.pad_token_id = None
    with torch.device("meta"):
        model = build(their_config)
    model.load_state_dict(named, assign=True)
    model.tie_weights()
    return model


def own_values(config: ModelConfig) -> dict[str, Any]:
    """What OpenLMConfig of the travelling file needs."""
    values = config.to_dict()
    known = ("hidden_dim", "n_layers", "n_heads", "seq_len", "vocab_size", "norm_eps", "rotary_base", "model_norm",
             "ffn_type", "positional_embedding_type", "qk_norm", "post_embed_norm", "attn_activation",
             "attn_seq_scalar", "attn_seq_scalar_alpha", "moe_freq", "moe_num_experts", "moe_top_k",
             "moe_expert_type", "moe_capacity_factor", "moe_loss_weight")  # fmt: skip
    return {
        **{name: values[name] for name in known},
        "n_kv_heads": config.kv_heads,
        "ffn_width": config.ffn_dim or default_width(config.ffn_type, config.hidden_dim),
        "expert_width": expert_width(config),
        "tie_word_embeddings": config.weight_tying,
        "auto_map": {
            "AutoConfig": "modeling_openlm.OpenLMConfig",
            "AutoModelForCausalLM": "modeling_openlm.OpenLMForCausalLM",
        },
    }


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
    """Write config and sharded safetensors, and the travelling file where it is needed."""
    model.save_pretrained(folder, max_shard_size="5GB")
    name_rotary_as_before(folder / "config.json")
    if type(model).__module__.endswith("modeling_openlm"):
        shutil.copyfile(MODELING, folder / MODELING.name)
