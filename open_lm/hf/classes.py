"""How a model becomes one of transformers: its own class where it has the architecture, else ours that travels."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_lm.checkpoint.families import native_family, to_native
from open_lm.errors import ConfigError
from open_lm.model.config import ModelConfig
from open_lm.model.feed_forward import gated_width

MODELING = Path(__file__).with_name("modeling_openlm.py")


def to_transformers(config: ModelConfig, weights: dict[str, Tensor]) -> Any:
    """A PreTrainedModel that shares `weights`, to be saved (its constants have no memory, so it cannot compute).

    Raises:
        ConfigError: it has experts or state-space layers, which neither transformers nor the travelling file has.
    """
    if not isinstance(config, ModelConfig) or config.moe_freq:
        raise ConfigError("only dense transformers can be exported; this model has experts or state-space layers.")
    from transformers import AutoConfig, AutoModelForCausalLM

    if native_family(config):
        values, named = to_native(config, weights)
        their_config: Any = AutoConfig.for_model(values.pop("model_type"), **values, bos_token_id=None)
        build: Callable[[Any], Any] = AutoModelForCausalLM.from_config
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
    width = 4 * config.hidden_dim if config.ffn_type == "gelu" else gated_width(config.hidden_dim)
    known = ("hidden_dim", "n_layers", "n_heads", "seq_len", "vocab_size", "norm_eps", "rotary_base", "model_norm",
             "ffn_type", "positional_embedding_type", "qk_norm", "post_embed_norm", "attn_activation",
             "attn_seq_scalar", "attn_seq_scalar_alpha")  # fmt: skip
    return {
        **{name: values[name] for name in known},
        "n_kv_heads": config.kv_heads,
        "ffn_width": config.ffn_dim or width,
        "tie_word_embeddings": config.weight_tying,
        "auto_map": {
            "AutoConfig": "modeling_openlm.OpenLMConfig",
            "AutoModelForCausalLM": "modeling_openlm.OpenLMForCausalLM",
        },
    }


def save(model: Any, folder: Path) -> None:
    """Write config and sharded safetensors, and the travelling file where it is needed."""
    model.save_pretrained(folder, max_shard_size="5GB")
    if type(model).__module__.endswith("modeling_openlm"):
        shutil.copyfile(MODELING, folder / MODELING.name)
