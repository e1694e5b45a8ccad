"""OpenLM's `hf_model`: `OpenLMforCausalLM`, whose `.model` holds the weights of an epoch_K.pt, and `OpenLMModel`."""

from __future__ import annotations

from typing import Any

from open_lm.hf.modeling_openlm import OpenLMForCausalLM
from open_lm.utils.transformers.hf_config import OpenLMConfig

__all__ = ["OpenLMModel", "OpenLMforCausalLM"]


class OpenLMforCausalLM(OpenLMForCausalLM):
    """The published class under OpenLM's own spelling."""

    config_class = OpenLMConfig  # type: ignore[assignment]


class OpenLMModel(OpenLMforCausalLM):
    """The same, called like OpenLM's own model: `(logits, hidden states, past_key_values)`."""

    def forward(self, tokens: Any = None, past_key_values: Any = None, use_cache: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        tokens = kwargs.pop("input_ids", tokens)
        found = super().forward(
            tokens, past_key_values=past_key_values, use_cache=use_cache, **{**kwargs, "output_hidden_states": True}
        )
        return found.logits, found.hidden_states[-1], found.past_key_values
