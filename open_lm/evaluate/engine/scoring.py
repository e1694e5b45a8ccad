"""Log-likelihoods of continuations.

Shapes: B contexts, R continuations, T positions, N scored tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.evaluate.engine.batching import ScoringBatch
from open_lm.evaluate.engine.token_stats import token_stats
from open_lm.kernels.dense_linear import dense_linear
from open_lm.model.cache import LayerCache, StaticCache
from open_lm.model.transformer import Transformer
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
        self.shares_contexts = isinstance(plain, Transformer) and not self.scales_with_length
        self.n_layers = plain.config.n_layers if self.shares_contexts else 0

    @torch.no_grad()
    def score(self, batch: ScoringBatch) -> dict[tuple[int, int], Score]:
        """The score of every continuation of `batch`, by (question, choice)."""
        with self.precision.autocast(), dense_linear(self.model):
            tokens_N4 = self._shared(batch) if batch.shares_context else self._single(batch)
        return _per_continuation(tokens_N4.cpu(), batch)

    @torch.no_grad()
    def idle(self, n_forwards: int) -> None:
        """Run the model without need, so that ranks with fewer batches keep step with the others."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        for _ in range(n_forwards):
            self.model(token, head=lambda hidden_BTD, weight_VD: hidden_BTD)

    def _single(self, batch: ScoringBatch) -> Tensor:
        """Context and continuation as one sequence, padded on the right, where causality makes padding harmless."""
        pairs = [(item.prefix, item.tails[0]) for item in batch.items]
        if self.scales_with_length:
            return torch.cat([self._rows([pair]) for pair in pairs])
        return self._rows(pairs)

    def _rows(self, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> Tensor:
        """The statistics of the continuations of `pairs`, in one forward pass."""
        ids_BT = self._padded([context + continuation[:-1] for context, continuation in pairs])
        rows, places = _scored_places([c for _, c in pairs], [len(context) - 1 for context, _ in pairs])
        targets_N = self._ids([token for _, continuation in pairs for token in continuation])
        return self._token_scores(ids_BT, None, rows, places, targets_N)

    def _shared(self, batch: ScoringBatch) -> Tensor:
        """Each prefix once; the tails from its cache, but for a first token that directly follows the prefix."""
        ids_BT, real_BT = self._padded_left([item.prefix for item in batch.items])
        prefix_of_R = self._ids([number for number, item in enumerate(batch.items) for _ in item.tails])
        tails = [tail for item in batch.items for tail in item.tails]
        n_given = [given for item in batch.items for given in item.n_given]
        firsts = [row for row, given in enumerate(n_given) if given == 0]
        prefix_of_firsts, targets_N = prefix_of_R[self._ids(firsts)], self._ids([tails[row][0] for row in firsts])
        last = slice(-1, None) if firsts else slice(0, 0)

        def head(hidden_BTD: Tensor, weight_VD: Tensor) -> Tensor:
            return token_stats(hidden_BTD[:, last].flatten(0, 1), weight_VD, prefix_of_firsts, targets_N)

        cache = ContextCache(self.n_layers)
        stats = self.model(ids_BT, past_key_values=cache, attention_mask_BT=real_BT, head=head)
        parts: list[list[Tensor]] = [[] for _ in tails]
        for row, part in zip(firsts, stats.split(1) if firsts else (), strict=True):
            parts[row].append(part)
        for group in batch.tail_groups:
            prefixes, chosen = prefix_of_R[self._ids(group)], [(tails[row], n_given[row]) for row in group]
            for row, part in zip(group, self._tails(chosen, prefixes, cache, real_BT), strict=True):
                parts[row].append(part)
        return torch.cat([part for row in parts for part in row])

    def _tails(
        self,
        tails: Sequence[tuple[tuple[int, ...], int]],
        prefixes: Tensor,
        cache: ContextCache,
        real_BT: Tensor | None,
    ) -> Sequence[Tensor]:
        """The statistics of the scored tokens of each `(tail, tokens given)`, but of a first one that directly follows
        its prefix, which is the one of number `prefixes` in `cache`."""
        starts = [max(given, 1) for _, given in tails]
        rest = [tail[start:] for (tail, _), start in zip(tails, starts, strict=True)]
        rows, places = _scored_places(rest, [start - 1 for start in starts])
        targets_N = self._ids([token for tokens in rest for token in tokens])
        ids_RT = self._padded([tail[:-1] for tail, _ in tails])
        real_RS = _with_prefix(real_BT, prefixes, ids_RT)
        stats_N4 = self._token_scores(ids_RT, cache.selected(prefixes), rows, places, targets_N, real_RS)
        return stats_N4.split([len(tokens) for tokens in rest])

    def after(self, ids_BT: Tensor, cache: ContextCache | None) -> Tensor:
        """Logits after the last position, (B, V); `cache` keeps all of them."""
        return self.model(ids_BT, past_key_values=cache, head=lambda h_BTD, w_VD: F.linear(h_BTD[:, -1], w_VD).float())

    def _token_scores(
        self, ids_BT: Tensor, cache: Any, rows: Tensor, places: Tensor, targets_N: Tensor, real_BS: Tensor | None = None
    ) -> Tensor:
        """Statistics of the tokens that follow the positions `places` of `rows`; only their logits are computed."""

        def head(hidden_BTD: Tensor, weight_VD: Tensor) -> Tensor:
            hidden_ND = hidden_BTD[rows.to(self.device), places.to(self.device)]
            return token_stats(hidden_ND, weight_VD, torch.arange(len(hidden_ND), device=self.device), targets_N)

        return self.model(ids_BT, past_key_values=cache, attention_mask_BT=real_BS, head=head)

    def _ids(self, ids: Sequence[Any]) -> Tensor:
        return torch.tensor(ids, dtype=torch.long).to(self.device)

    def _padded(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, sequences))
        return self._ids([[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences])

    def _padded_left(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
        """Sequences that end together, and which of their positions are real; None where all are."""
        longest = max(map(len, sequences))
        missing = torch.tensor([longest - len(sequence) for sequence in sequences])
        ids_BT = self._ids([[*[0] * (longest - len(sequence)), *sequence] for sequence in sequences])
        real_BT = (torch.arange(longest) >= missing[:, None]).to(self.device) if missing.any() else None
        return ids_BT, real_BT


class ContextCache(StaticCache):
    """The keys and values of contexts, in the type they were computed in, ready to be shared by continuations."""

    def __init__(self, n_layers: int):
        self.layers: list[Any] = [LayerCache() for _ in range(n_layers)]

    @property
    def length(self) -> int:
        past = self.layers[0].past
        return 0 if past is None else past[0].shape[1]

    def selected(self, rows: Tensor) -> ContextCache:
        """A cache in which row i has seen what context `rows[i]` has; there may be more rows than contexts."""
        found = ContextCache(len(self.layers))
        for layer, own in zip(self.layers, found.layers, strict=True):
            own.past = tuple(part.index_select(0, rows) for part in layer.past)
        return found


def _scored_places(continuations: Sequence[Sequence[int]], starts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Row and position that predict each token: the first token of row r is predicted at `starts[r]`."""
    lengths = torch.tensor([len(continuation) for continuation in continuations])
    rows = torch.repeat_interleave(lengths)
    within = torch.arange(len(rows)) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    return rows, within + torch.tensor(starts)[rows]


def _with_prefix(real_BT: Tensor | None, row_of_R: Tensor, ids_RT: Tensor) -> Tensor | None:
    """Mask of the real positions, of the prefix of each row and of what follows it."""
    return None if real_BT is None else torch.cat((real_BT[row_of_R], torch.ones_like(ids_RT, dtype=torch.bool)), 1)


def _per_continuation(tokens_N4: Tensor, batch: ScoringBatch) -> dict[tuple[int, int], Score]:
    names = [name for item in batch.items for name in item.names]
    lengths = [n_scored for item in batch.items for n_scored in item.n_scored]
    scores = {}
    for name, part in zip(names, tokens_N4.split(lengths), strict=True):
        mean = part.mean(0).tolist()
        scores[name] = Score(mean[0], bool(part[:, 1].all()), mean[2], float(part[:, 3].min()))
    return scores
