"""The decoder-only transformer.

Shapes: B batch, T positions, S positions with those in the cache, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from open_lm.model.attention import Attention
from open_lm.model.cache import GrowingCache, KeyValue, LayerCache, StaticCache
from open_lm.model.config import ModelConfig
from open_lm.model.init import scaled_normal_
from open_lm.model.mask import Mask
from open_lm.model.moe import MixtureOfExperts, Routing, over_layers
from open_lm.model.norms import build_norm
from open_lm.model.rotary import Angles
from open_lm.model.slots import SlotCache
from open_lm.model.variants import FEED_FORWARDS


def build_feed_forward(config: ModelConfig, layer: int) -> nn.Module:
    """The feed-forward layer of block number `layer`, counted from 0; a mixture of experts also returns its Routing."""
    if config.has_experts(layer):
        return MixtureOfExperts(config, layer)
    return FEED_FORWARDS.load(config.ffn_type)(config.hidden_dim, layer, config.ffn_dim)


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = build_feed_forward(config, layer)
        self.attention_norm = build_norm(config, config.hidden_dim)
        self.ffn_norm = build_norm(config, config.hidden_dim)

    def forward(self, x_BTD: Tensor, angles: Angles | None, mask: Mask, cache: LayerCache | None = None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), angles, mask, cache)
        return x_BTD + self.feed_forward(self.ffn_norm(x_BTD))


class ExpertBlock(Block):
    """A block whose feed-forward layer is a mixture of experts; it also returns what the router did."""

    def forward(  # type: ignore[override]
        self, x_BTD: Tensor, angles: Angles | None, mask: Mask, cache: LayerCache | None = None
    ) -> tuple[Tensor, Routing]:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), angles, mask, cache)
        mixed_BTD, routing = self.feed_forward(self.ffn_norm(x_BTD))
        return x_BTD + mixed_BTD, routing


class Transformer(nn.Module):
    """Token ids to logits of the next token; the keys of its state dict are OpenLM's."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_dim)
        self.post_embed_norm = build_norm(config, config.hidden_dim) if config.post_embed_norm else nn.Identity()
        self.layers = nn.ModuleList(
            (ExpertBlock if config.has_experts(layer) else Block)(config, layer) for layer in range(config.n_layers)
        )
        self.norm = build_norm(config, config.hidden_dim)
        self.output = nn.Linear(config.hidden_dim, config.vocab_size, bias=False)
        self.tie_weights()
        self.register_load_state_dict_post_hook(lambda model, _: model.tie_weights())

    def tie_weights(self) -> None:
        """Make token embedding and output one parameter again, where the config says so, after either was replaced."""
        if self.config.weight_tying and self.tok_embeddings.weight is not self.output.weight:
            self.tok_embeddings.weight = self.output.weight

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # `to`, `to_empty` and their like replace parameters
        super()._apply(fn, recurse)
        self.tie_weights()
        return self

    def reset_parameters(self) -> None:
        """Embeddings and output: 1/sqrt(D)."""
        scaled_normal_(self.tok_embeddings.weight, self.config.hidden_dim**-0.5)
        scaled_normal_(self.output.weight, self.config.hidden_dim**-0.5)

    def new_cache(self, batch: int, max_len: int) -> StaticCache:
        """An empty cache for decoding `batch` rows of at most `max_len` positions."""
        weight = self.output.weight
        return StaticCache(self.config, batch, max_len, weight.device, weight.dtype)

    def forward(
        self,
        input_ids_BT: Tensor,
        past_key_values: StaticCache | Sequence[KeyValue] | None = None,
        use_cache: bool = False,
        attention_mask_BT: Tensor | None = None,
        *,
        documents_BT: Tensor | None = None,
        head: Callable[..., Any] | None = None,
    ) -> Any:
        """`(logits_BTV in fp32, hidden_BTD, past_key_values)`, or `head(hidden_BTD, output_VD)` when a head is given.

        In training mode a model with experts calls `head(hidden_BTD, output_VD, routing=Routing)`.

        With `documents_BT`, the number of each position's document, attention stays inside documents; the positions
        run on, which changes nothing: every embedding here is blind to an offset. It excludes cache and padding.
        `attention_mask_BT` is 0 (or false) on positions that are padding, those in the cache included. With `use_cache`
        the returned `past_key_values` continue from here; a StaticCache given as `past_key_values` is itself extended.
        """
        cache: Any = past_key_values
        if not isinstance(cache, StaticCache) and (use_cache or cache):
            cache = GrowingCache(cache, len(self.layers))
        assert documents_BT is None or (cache is None and attention_mask_BT is None)
        hidden_BTD, routings = self._hidden(input_ids_BT, cache, documents_BT, attention_mask_BT)
        if head is not None:
            routing = {"routing": over_layers(routings)} if routings and self.training else {}
            return head(hidden_BTD, self.output.weight, **routing)
        logits_BTV = self.output(hidden_BTD).float()
        past = cache.key_values() if isinstance(cache, GrowingCache) else cache
        return logits_BTV, hidden_BTD, past if use_cache else None

    def _hidden(
        self, input_ids_BT: Tensor, cache: Any, documents_BT: Tensor | None, real_BS: Tensor | None
    ) -> tuple[Tensor, list[Routing]]:
        """What the output layer reads, (B, T, D), and what the routers did in each layer with experts."""
        n_new, n_past = input_ids_BT.shape[1], cache.length if cache is not None else 0
        window, device = self.config.sliding_window, input_ids_BT.device
        if isinstance(cache, SlotCache):
            places, mask = cache.places(), cache.mask(window)
        else:
            places = torch.arange(n_past, n_past + n_new, device=device)
            mask = Mask(n_new, n_past + n_new, device, window=window, documents_BS=documents_BT, real_BS=real_BS)
        first: Any = self.layers[0]
        angles = first.attention.pos_embed.angles(places)
        x_BTD = self.post_embed_norm(self.tok_embeddings(input_ids_BT))
        routings = []
        for number, block in enumerate(self.layers):
            x_BTD = block(x_BTD, angles, mask, cache.layers[number] if cache is not None else None)
            if isinstance(x_BTD, tuple):
                x_BTD, routing = x_BTD
                routings.append(routing)
        return self.norm(x_BTD), routings
