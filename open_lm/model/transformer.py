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
from open_lm.model.context import SequencePart
from open_lm.model.init import scaled_normal_
from open_lm.model.mask import Mask, Reach
from open_lm.model.moe import MixtureOfExperts, Routing, over_layers
from open_lm.model.norms import build_norm
from open_lm.model.parametrization import branch_divisor, embedding_std, output_std
from open_lm.model.rotary import Angles
from open_lm.model.slots import SlotCache
from open_lm.model.split import TensorPlan, Tokens, Vocabulary
from open_lm.model.trees import Trees
from open_lm.model.variants import FEED_FORWARDS

Placed = tuple[Tensor, Mask, Sequence[LayerCache | None]]
"""The place of a forward pass's ids: positions (T,), the mask, and the cache of each layer."""


def build_feed_forward(config: ModelConfig, layer: int) -> nn.Module:
    """The feed-forward layer of block number `layer`, counted from 0; a mixture of experts also returns its Routing."""
    if config.has_experts(layer):
        return MixtureOfExperts(config, layer)
    return FEED_FORWARDS.load(config.ffn_type)(config.hidden_dim, branch_divisor(config, layer), config.ffn_dim)


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = build_feed_forward(config, layer)
        self.attention_norm = build_norm(config, config.hidden_dim)
        self.ffn_norm = build_norm(config, config.hidden_dim)

    def tensor_plan(self) -> TensorPlan:
        """Norms act on each position by itself; attention and feed-forward have plans of their own."""
        return {"attention_norm": Tokens(), "ffn_norm": Tokens()}

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
        self.reach = Reach(config.sliding_window)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_dim)
        self.post_embed_norm = build_norm(config, config.hidden_dim) if config.post_embed_norm else nn.Identity()
        self.layers = nn.ModuleList(
            (ExpertBlock if config.has_experts(layer) else Block)(config, layer) for layer in range(config.n_layers)
        )
        self.norm = build_norm(config, config.hidden_dim)
        self.output = nn.Linear(config.hidden_dim, config.vocab_size, bias=False)
        self.tie_weights()
        self.register_load_state_dict_post_hook(lambda model, _: model.tie_weights())

    def tensor_plan(self) -> TensorPlan:
        """A part of the vocabulary for each rank."""
        plan: TensorPlan = {"tok_embeddings": Vocabulary(), "norm": Tokens(), "output": Vocabulary()}
        return plan | ({"post_embed_norm": Tokens()} if self.config.post_embed_norm else {})

    def tie_weights(self) -> None:
        """Make token embedding and output one parameter again, where the config says so, after either was replaced."""
        if self.config.weight_tying and self.tok_embeddings.weight is not self.output.weight:
            self.tok_embeddings.weight = self.output.weight

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # `to`, `to_empty` and their like replace parameters
        super()._apply(fn, recurse)
        self.tie_weights()
        return self

    def reset_parameters(self) -> None:
        """Embeddings and output: 1/sqrt(D), or as the parametrization says."""
        scaled_normal_(self.tok_embeddings.weight, embedding_std(self.config))
        scaled_normal_(self.output.weight, output_std(self.config))

    def new_cache(self, batch: int, max_len: int) -> StaticCache:
        """An empty cache for decoding `batch` rows of at most `max_len` positions."""
        weight = self.output.weight
        first: Any = self.layers[0]
        return StaticCache(len(self.layers), batch, max_len, first.attention.key_shape, weight.device, weight.dtype)

    def forward(
        self,
        input_ids_BT: Tensor,
        past_key_values: StaticCache | Sequence[KeyValue] | None = None,
        use_cache: bool = False,
        attention_mask_BT: Tensor | None = None,
        *,
        documents_BT: Tensor | None = None,
        part: SequencePart | Trees | None = None,
        head: Callable[..., Any] | None = None,
    ) -> Any:
        """`(logits_BTV in fp32, hidden_BTD, past_key_values)`, or `head(hidden_BTD, output_VD)` when a head is given.

        In training mode a model with experts calls `head(hidden_BTD, output_VD, routing=Routing)`.

        With `documents_BT`, the number of each position's document, attention stays inside documents; the positions
        run on, which changes nothing: every embedding here is blind to an offset. It excludes cache and padding.
        `attention_mask_BT` is 0 (or false) on positions that are padding, those in the cache included. With `use_cache`
        the returned `past_key_values` continue from here; a StaticCache given as `past_key_values` is itself extended.
        With a SequencePart as `part`, `input_ids_BT` are this rank's positions of sequences that ranks share out, and
        `documents_BT` are of the whole sequences; with Trees, they are one row of the nodes of these.
        """
        cache: Any = past_key_values
        if not isinstance(cache, StaticCache) and (use_cache or cache):
            cache = GrowingCache(cache, len(self.layers))
        assert (documents_BT is None and part is None) or (cache is None and attention_mask_BT is None)
        if part is None:
            placed = self._placed(input_ids_BT, cache, documents_BT, attention_mask_BT)
        else:
            placed = self._placed_in(part, input_ids_BT, documents_BT)
        hidden_BTD, routings = self._hidden(input_ids_BT, *placed)
        if head is not None:
            routing = {"routing": over_layers(routings)} if routings and self.training else {}
            return head(hidden_BTD, self.output_weight(), **routing)
        logits_BTV = self.output(hidden_BTD).float()
        past = cache.key_values() if isinstance(cache, GrowingCache) else cache
        return logits_BTV, hidden_BTD, past if use_cache else None

    def output_weight(self) -> Tensor:
        """The matrix that a head multiplies hidden states with, (V, D)."""
        return self.output.weight

    def _placed(self, ids_BT: Tensor, cache: Any, documents_BT: Tensor | None, real_BS: Tensor | None) -> Placed:
        """Whole sequences, or what continues the `cache`."""
        if isinstance(cache, SlotCache):
            return cache.places(), cache.mask(self.reach), cache.layers
        n_new, n_past = ids_BT.shape[1], cache.length if cache is not None else 0
        n_keys = n_past + n_new
        mask = Mask(n_new, n_keys, ids_BT.device, reach=self.reach, documents_BS=documents_BT, real_BS=real_BS)
        caches = [None] * len(self.layers) if cache is None else cache.layers
        return torch.arange(n_past, n_keys, device=ids_BT.device), mask, caches

    def _placed_in(self, part: SequencePart | Trees, ids_BT: Tensor, documents_BS: Tensor | None) -> Placed:
        """As `part` says, which gives layers the keys and values as a cache does."""
        n_local, device = ids_BT.shape[1], ids_BT.device
        mask = part.mask(n_local, device, reach=self.reach, documents_BS=documents_BS)
        return part.positions(n_local, device), mask, [part] * len(self.layers)

    def _hidden(
        self, input_ids_BT: Tensor, positions_T: Tensor, mask: Mask, caches: Sequence[LayerCache | None]
    ) -> tuple[Tensor, list[Routing]]:
        """The input of the output layer, (B, T, D), and the routers' statistics of each layer with experts."""
        first: Any = self.layers[0]
        angles = first.attention.pos_embed.angles(positions_T)
        x_BTD = self.post_embed_norm(self.tok_embeddings(input_ids_BT))
        routings = []
        for block, cache in zip(self.layers, caches, strict=True):
            x_BTD = block(x_BTD, angles, mask, cache)
            if isinstance(x_BTD, tuple):
                x_BTD, routing = x_BTD
                routings.append(routing)
        return self.norm(x_BTD), routings
