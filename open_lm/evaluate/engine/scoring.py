"""Log-likelihoods of continuations.

Shapes: B rows, T positions, N scored tokens, M positions that predict them, D model width, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.evaluate.engine.batching import ScoringBatch, ScoringTree
from open_lm.evaluate.engine.token_stats import token_stats
from open_lm.kernels.dense_linear import dense_linear
from open_lm.model.cache import LayerCache, StaticCache
from open_lm.model.transformer import Transformer
from open_lm.model.trees import Trees
from open_lm.precision import Precision


class Score(NamedTuple):
    """Score of one continuation under a model, over its tokens."""

    cross_entropy: float  # mean, nats per token
    all_greedy: bool  # each token is the most likely one
    mean_probability: float  # of the continuation's tokens
    least_confidence: float  # the smallest probability of any most likely token


class Scorer:
    """Scores batches with a Transformer (or a wrapped one) on the device that holds it.

    Without gradients, but not in inference mode: FSDP keeps tensors of its first forward pass for all later ones, and a
    model may be trained after it was scored.
    """

    def __init__(self, model: nn.Module, device: torch.device, precision: Precision):
        self.model, self.device, self.precision = model, device, precision
        plain: Any = getattr(model, "module", model)
        config = getattr(plain, "config", None)
        self.scales_with_length = getattr(config, "attn_seq_scalar", None) in ("max", "avg")
        """Attention is scaled by the number of keys, so that padding would change it: rows are scored one by one."""
        self.runs_trees = isinstance(plain, Transformer) and not self.scales_with_length
        """Sequences run as trees, answers are written with a cache; other models get whole rows."""
        self.n_layers = plain.config.n_layers if self.runs_trees else 0

    @torch.no_grad()
    def score(self, batch: ScoringBatch) -> dict[tuple[int, int], Score]:
        """The score of every continuation of `batch`, by (question, choice)."""
        trees = batch.trees
        with self.precision.autocast(), dense_linear(self.model):
            tokens_N4 = self._packed(trees) if self.runs_trees else self._padded(trees)
        return _per_continuation(tokens_N4.tolist(), trees)

    @torch.no_grad()
    def idle(self, n_forwards: int) -> None:
        """Run the model without need, so that ranks with fewer batches keep step with the others."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        for _ in range(n_forwards):
            self.model(token, head=lambda hidden_BTD, weight_VD: hidden_BTD)

    def after(self, ids_BT: Tensor, cache: ContextCache | None) -> Tensor:
        """Logits after the last position, (B, V); `cache` keeps all of them."""
        return self.model(ids_BT, past_key_values=cache, head=lambda h_BTD, w_VD: F.linear(h_BTD[:, -1], w_VD).float())

    def _packed(self, trees: Sequence[ScoringTree]) -> Tensor:
        """The nodes of all trees as one row; the statistics of every choice's tokens, in order, (N, 4)."""
        ids_1N = self._ids([[token for tree in trees for token in tree.tree.tokens]])
        starts = itertools.accumulate((len(tree.tree.tokens) for tree in trees), initial=0)
        places = [start + node for start, tree in zip(starts, trees, strict=False) for p in tree.places for node in p]
        return self._stats(ids_1N, places, trees, part=Trees([tree.tree for tree in trees]))

    def _padded(self, trees: Sequence[ScoringTree]) -> Tensor:
        """The same of trees that are one sequence each, padded on the right, where causality makes padding harmless."""
        if self.scales_with_length and len(trees) > 1:
            return torch.cat([self._padded([tree]) for tree in trees])
        longest = max(len(tree.tree.tokens) for tree in trees)
        ids_BT = self._ids([[*tree.tree.tokens, *[0] * (longest - len(tree.tree.tokens))] for tree in trees])
        places = [row * longest + node for row, tree in enumerate(trees) for p in tree.places for node in p]
        return self._stats(ids_BT, places, trees)

    def _stats(self, ids_BT: Tensor, places: Sequence[int], trees: Sequence[ScoringTree], **part: Trees) -> Tensor:
        """Statistics of the tokens predicted at `places`, counted through all rows; only these logits are computed."""
        places_M, row_N = torch.tensor(places).unique(return_inverse=True)
        targets_N = self._ids([token for tree in trees for targets in tree.targets for token in targets])
        order_N = row_N.argsort(stable=True).to(self.device)

        def head(hidden_BTD: Tensor, weight_VD: Tensor) -> Tensor:
            hidden_MD = hidden_BTD.flatten(0, 1)[places_M.to(self.device)]
            return token_stats(hidden_MD, weight_VD, row_N.to(self.device)[order_N], targets_N[order_N])

        stats_N4 = self.model(ids_BT, head=head, **part)
        return torch.empty_like(stats_N4).index_copy_(0, order_N, stats_N4)

    def _ids(self, ids: Sequence[Any]) -> Tensor:
        return torch.tensor(ids, dtype=torch.long).to(self.device)


class ContextCache(StaticCache):
    """The keys and values of contexts, in the type they were computed in."""

    def __init__(self, n_layers: int):
        self.layers: list[Any] = [LayerCache() for _ in range(n_layers)]

    @property
    def length(self) -> int:
        past = self.layers[0].past
        return 0 if past is None else past[0].shape[1]


def _per_continuation(
    tokens_N4: Sequence[Sequence[float]], trees: Sequence[ScoringTree]
) -> dict[tuple[int, int], Score]:
    """The rows of each choice's tokens as one Score."""
    rows = iter(tokens_N4)
    scores = {}
    for tree in trees:
        for name, targets in zip(tree.names, tree.targets, strict=True):
            losses, greedy, probabilities, largest = zip(*itertools.islice(rows, len(targets)), strict=True)
            n = len(targets)
            scores[name] = Score(sum(losses) / n, all(greedy), sum(probabilities) / n, min(largest))
    return scores
