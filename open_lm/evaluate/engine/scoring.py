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
        with self.precision.autocast():
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
        row_of_R = torch.repeat_interleave(torch.tensor([len(item.tails) for item in batch.items])).to(self.device)
        tails = [tail for item in batch.items for tail in item.tails]
        n_given = [given for item in batch.items for given in item.n_given]
        follow = torch.tensor([given == 0 for given in n_given]).to(self.device)
        firsts = [tail[0] for tail, given in zip(tails, n_given, strict=True) if given == 0]
        if batch.n_forwards == 1:
            targets_R = self._ids(firsts)
            return self.model(
                ids_BT, attention_mask_BT=real_BT,
                head=lambda h_BTD, w_VD: token_stats(h_BTD[:, -1], w_VD, row_of_R, targets_R),
            )  # fmt: skip
        cache = ContextCache(self.n_layers)
        last_BD = self.model(
            ids_BT, past_key_values=cache, attention_mask_BT=real_BT, head=lambda h_BTD, w_VD: h_BTD[:, -1]
        )
        cache.reorder(row_of_R)
        starts = [max(given, 1) for given in n_given]
        rest = [tail[start:] for tail, start in zip(tails, starts, strict=True)]
        rows, places = _scored_places(rest, [start - 1 for start in starts])
        targets_N = self._ids([token for tokens in (firsts, *rest) for token in tokens])
        inputs_RT = self._padded([tail[:-1] for tail in tails])
        stats_N4 = self._token_scores(
            inputs_RT,
            cache,
            rows,
            places,
            targets_N,
            last_BD,
            row_of_R[follow],
            _with_prefix(real_BT, row_of_R, inputs_RT),
        )
        return _interleaved(stats_N4, len(firsts), follow.tolist(), [len(tokens) for tokens in rest])

    def after(self, ids_BT: Tensor, cache: ContextCache | None) -> Tensor:
        """Logits after the last position, (B, V); `cache` keeps all of them."""
        return self.model(ids_BT, past_key_values=cache, head=lambda h_BTD, w_VD: F.linear(h_BTD[:, -1], w_VD).float())

    def _token_scores(
        self,
        ids_BT: Tensor,
        cache: Any,
        rows: Tensor,
        places: Tensor,
        targets_N: Tensor,
        further_MD: Tensor | None = None,
        further_rows: Tensor | None = None,
        real_BS: Tensor | None = None,
    ) -> Tensor:
        """Statistics of the tokens that follow the positions `places` of `rows`; only their logits are computed.

        The first of `targets_N` follow `further_rows` of `further_MD`, positions of an earlier forward pass.
        """

        def head(hidden_BTD: Tensor, weight_VD: Tensor) -> Tensor:
            hidden_ND = hidden_BTD[rows.to(self.device), places.to(self.device)]
            row_N = torch.arange(len(hidden_ND), device=self.device)
            if further_MD is not None and further_rows is not None:
                hidden_ND = torch.cat((further_MD, hidden_ND))
                row_N = torch.cat((further_rows, row_N + len(further_MD)))
            return token_stats(hidden_ND, weight_VD, row_N, targets_N)

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

    def reorder(self, rows: Tensor) -> None:
        """Let row i continue what context `rows[i]` has seen; there may be more rows than contexts."""
        for layer in self.layers:
            layer.past = tuple(part.index_select(0, rows) for part in layer.past)


def _scored_places(continuations: Sequence[Sequence[int]], starts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Row and position that predict each token: the first token of row r is predicted at `starts[r]`."""
    lengths = torch.tensor([len(continuation) for continuation in continuations])
    rows = torch.repeat_interleave(lengths)
    within = torch.arange(len(rows)) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    return rows, within + torch.tensor(starts)[rows]


def _with_prefix(real_BT: Tensor | None, row_of_R: Tensor, ids_RT: Tensor) -> Tensor | None:
    """Mask of the real positions, of the prefix of each row and of what follows it."""
    return None if real_BT is None else torch.cat((real_BT[row_of_R], torch.ones_like(ids_RT, dtype=torch.bool)), 1)


def _interleaved(stats_N4: Tensor, n_firsts: int, has_first: Sequence[bool], n_rest: Sequence[int]) -> Tensor:
    """The first `n_firsts` rows, those of first tokens, put before the other tokens of the tails that have one."""
    firsts = iter(stats_N4[:n_firsts].split(1))
    parts = zip(has_first, stats_N4[n_firsts:].split(list(n_rest)), strict=True)
    return torch.cat([tensor for first, rest in parts for tensor in ((next(firsts), rest) if first else (rest,))])


def _per_continuation(tokens_N4: Tensor, batch: ScoringBatch) -> dict[tuple[int, int], Score]:
    names = [name for item in batch.items for name in item.names]
    lengths = [n_scored for item in batch.items for n_scored in item.n_scored]
    scores = {}
    for name, part in zip(names, tokens_N4.split(lengths), strict=True):
        mean = part.mean(0).tolist()
        scores[name] = Score(mean[0], bool(part[:, 1].all()), mean[2], float(part[:, 3].min()))
    return scores
