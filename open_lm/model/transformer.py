"""The decoder-only transformer.  Shapes: B batch, T positions, D model width, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.model.attention import Attention, KeyValue
from open_lm.model.config import FEED_FORWARDS, NORMS, ModelConfig
from open_lm.model.init import scaled_normal_


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        norm = NORMS.load(config.model_norm)
        self.attention = Attention(config, layer)
        self.feed_forward = FEED_FORWARDS.load(config.ffn_type)(config.hidden_dim, layer)
        self.attention_norm = norm(config.hidden_dim)
        self.ffn_norm = norm(config.hidden_dim)

    def forward(
        self, x_BTD: Tensor, past: KeyValue | None = None, mask_BS: Tensor | None = None
    ) -> tuple[Tensor, KeyValue]:
        mixed_BTD, key_value = self.attention(self.attention_norm(x_BTD), past, mask_BS)
        x_BTD = x_BTD + mixed_BTD
        return x_BTD + self.feed_forward(self.ffn_norm(x_BTD)), key_value


class Transformer(nn.Module):
    """Token ids to logits of the next token; keys of the state dict are OpenLM's."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_dim)
        norm = NORMS.load(config.model_norm)
        self.post_embed_norm = norm(config.hidden_dim) if config.post_embed_norm else nn.Identity()
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = norm(config.hidden_dim)
        self.output = nn.Linear(config.hidden_dim, config.vocab_size, bias=False)
        if config.weight_tying:
            self.tok_embeddings.weight = self.output.weight
        for module in reversed(list(self.modules())):
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def reset_parameters(self) -> None:
        """Embeddings and output: 1/sqrt(D)."""
        scaled_normal_(self.tok_embeddings.weight, self.config.hidden_dim**-0.5)
        scaled_normal_(self.output.weight, self.config.hidden_dim**-0.5)

    def forward(
        self,
        input_ids_BT: Tensor,
        past_key_values: Sequence[KeyValue] | None = None,
        use_cache: bool = False,
        attention_mask_BT: Tensor | None = None,
        *,
        head: Callable[[Tensor, Tensor], Any] | None = None,
    ) -> Any:
        """`(logits_BTV in fp32, hidden_BTD, past_key_values)`, or `head(hidden_BTD, output_VD)` when one is given."""
        x_BTD = self.post_embed_norm(self.tok_embeddings(input_ids_BT))
        pasts = past_key_values or [None] * len(self.layers)
        key_values = []
        for block, past in zip(self.layers, pasts, strict=True):
            x_BTD, key_value = block(x_BTD, past, attention_mask_BT)
            key_values.append(key_value)
        hidden_BTD = self.norm(x_BTD)
        if head is not None:
            return head(hidden_BTD, self.output.weight)
        logits_BTV = F.linear(hidden_BTD, self.output.weight).float()
        return logits_BTV, hidden_BTD, key_values if use_cache else None
