"""Any causal language model of transformers, called like a Transformer.

Shapes: B batch, T positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.errors import ConfigError
from open_lm.model.hf_config import HFConfig

HEAD_TOLERANCE = 1e-3
"""Largest relative difference between a model's own logits and the plain product of hidden state and output matrix."""


class HFCache:
    """The keys and values that transformers keeps, under the names our decoding uses."""

    def __init__(self, config: Any):
        from transformers import DynamicCache

        self.kept: Any = DynamicCache(config=config)

    @property
    def length(self) -> int:
        """Positions seen so far."""
        return self.kept.get_seq_length()

    def reorder(self, rows: Tensor) -> None:
        """Let row i of the batch continue what row `rows[i]` has seen."""
        self.kept.reorder_cache(rows)


class HFModel(nn.Module):
    """An AutoModelForCausalLM; `reset_parameters` gives it the weights published under its name."""

    def __init__(self, config: HFConfig):
        super().__init__()
        from transformers import AutoConfig, AutoModelForCausalLM

        self.config = config
        architecture = AutoConfig.for_model(**config.hf_config)
        self.model: Any = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
        self._let_buffers_be_reset()
        self.register_load_state_dict_post_hook(lambda model, _: model.model.tie_weights())

    def _let_buffers_be_reset(self) -> None:
        """Buffers that no file holds (rotary frequencies) are computed again by who built the model on `meta`."""
        for module in self.model.modules():
            if module._non_persistent_buffers_set and not hasattr(module, "reset_parameters"):
                module.reset_parameters = partial(self.model._init_weights, module)

    @property
    def layers(self) -> nn.ModuleList:
        """The repeated blocks: those of class --hf-fsdp-block, or the longest list of modules.

        Raises:
            ConfigError: there is no such list.
        """
        lists = [module for module in self.model.modules() if isinstance(module, nn.ModuleList) and len(module)]
        named = [blocks for blocks in lists if type(blocks[0]).__name__ == self.config.hf_fsdp_block]
        if self.config.hf_fsdp_block and not named:
            classes = sorted({type(blocks[0]).__name__ for blocks in lists})
            raise ConfigError(
                f"--hf-fsdp-block {self.config.hf_fsdp_block}: {self.config.hf_model} repeats {', '.join(classes)}."
            )
        if not lists:
            raise ConfigError(f"--hf-model {self.config.hf_model}: has no list of blocks.")
        return max(named or lists, key=len)

    def reset_parameters(self) -> None:
        """The published weights, in fp32, on the device the model is on.

        Raises:
            ConfigError: they cannot be read, or the output is more than a matrix product.
        """
        from transformers import AutoModelForCausalLM

        name, device = self.config.hf_model, next(self.parameters()).device
        try:
            loaded = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"--hf-model {name}: its weights cannot be read ({error}).") from error
        self.model = cast("Any", loaded).to(device)
        self._let_buffers_be_reset()
        self.require_plain_head()

    @torch.no_grad()
    def require_plain_head(self) -> None:
        """Refuse models that scale, bend or shift their logits: the loss here is computed from the product alone."""
        device = next(self.parameters()).device
        ids_BT = torch.arange(4, device=device)[None] % self.config.vocab_size
        was_training = self.training
        self.eval()
        product = self(ids_BT)[0]
        logits = self.model(input_ids=ids_BT, use_cache=False).logits.float()
        self.train(was_training)
        if (product - logits).abs().max() > HEAD_TOLERANCE * logits.abs().max():
            raise ConfigError(
                f"--hf-model {self.config.hf_model}: computes more than a matrix product after its last hidden state "
                "(a scale, a cap or a bias on the logits), which the loss here does not know. Choose another model."
            )

    def new_cache(self, batch: int, max_len: int) -> HFCache:
        """An empty cache; it grows as it is used."""
        return HFCache(self.model.config)

    def forward(
        self,
        input_ids_BT: Tensor,
        past_key_values: HFCache | None = None,
        use_cache: bool = False,
        attention_mask_BT: Tensor | None = None,
        *,
        head: Callable[..., Any] | None = None,
    ) -> Any:
        """`(logits_BTV in fp32, hidden_BTD, past_key_values)`, or `head(hidden_BTD, output_VD)` with a head."""
        cache = past_key_values or (self.new_cache(len(input_ids_BT), 0) if use_cache else None)
        options: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            options["past_key_values"] = cache.kept
        if attention_mask_BT is not None:
            places_BT = (attention_mask_BT.long().cumsum(-1) - 1).clamp(min=0)
            options["attention_mask"] = attention_mask_BT.long()
            options["position_ids"] = places_BT[:, -input_ids_BT.shape[1] :]
        hidden_BTD = self.model.get_decoder()(input_ids=input_ids_BT, **options).last_hidden_state
        output_VD = self.model.get_output_embeddings().weight
        if head is not None:
            return head(hidden_BTD, output_VD)
        return F.linear(hidden_BTD, output_VD).float(), hidden_BTD, cache if use_cache else None
