"""Beam search: the likeliest text, searched with several candidates at once.

Shapes: B prompts, N beams of each, V vocabulary; a row is one beam of one prompt, B*N of them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from open_lm.generation.config import GenerateConfig
from open_lm.generation.cpu_decode import cpu_decode
from open_lm.generation.padded import PaddedTexts
from open_lm.generation.prompts import check_prompts, rooms
from open_lm.model.transformer import Transformer


@dataclass(frozen=True)
class Beam:
    """One text that the search found: its tokens, a stop token included, and its score."""

    tokens: list[int]
    score: float


@dataclass
class Search:
    """The beams of one prompt: those still written, with their log-probabilities, and the best that have ended."""

    n_beams: int
    length_penalty: float
    room: int
    """Tokens that may be written, at most."""
    live: list[tuple[list[int], float]]
    ended: list[Beam] = field(default_factory=list)

    def score(self, log_probability: float, n_tokens: int) -> float:
        """Rank of a beam."""
        return log_probability / n_tokens**self.length_penalty

    def end(self, tokens: list[int], log_probability: float) -> None:
        """Keep a text that has ended, if it is among the best."""
        self.ended.append(Beam(tokens, self.score(log_probability, len(tokens))))
        self.ended = sorted(self.ended, key=lambda beam: -beam.score)[: self.n_beams]

    @property
    def done(self) -> bool:
        """Whether no token may be added, or no live beam, were it to end now, would be among the best."""
        return len(self.live[0][0]) >= self.room or self._decided

    @property
    def _decided(self) -> bool:
        if len(self.ended) < self.n_beams:
            return False
        tokens, log_probability = self.live[0]
        return self.ended[-1].score >= self.score(log_probability, max(1, len(tokens)))

    def step(self, candidates: Sequence[tuple[int, int, float]], stop_ids: Collection[int]) -> list[tuple[int, int]]:
        """Go on with the best of `candidates` (beam, token, log-probability; the likeliest first).

        Returns the beam that each new beam continues, and its token.
        """
        taken: list[tuple[int, int]] = []
        live: list[tuple[list[int], float]] = []
        for rank, (beam, token, log_probability) in enumerate(candidates):
            tokens = [*self.live[beam][0], token]
            if token in stop_ids:
                if rank < self.n_beams and log_probability > -torch.inf:
                    self.end(tokens, log_probability)
            elif len(taken) < self.n_beams:
                taken.append((beam, token))
                live.append((tokens, log_probability))
        self.live = live
        return taken

    def ranked(self) -> list[Beam]:
        """All texts found, the best first; live ones count as ended where they are."""
        for tokens, log_probability in self.live:
            if not self._decided and log_probability > -torch.inf:
                self.end(tokens, log_probability)
        return self.ended


@torch.inference_mode()
def beam_search(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig | None = None,
    *,
    stop_ids: Collection[int] = (),
    **settings: Any,
) -> list[list[Beam]]:
    """For each prompt the `num_beams` best texts found, the best first.

    Scores are log-probabilities divided by `tokens ** length_penalty`, as transformers has them; with
    `length_penalty=0` plain sums, as OLMo has them.

    Raises:
        ConfigError: a prompt is empty, too long, or holds ids beyond the vocabulary.
    """
    config = config or GenerateConfig(**settings)
    n = config.num_beams
    check_prompts(model, prompts)
    n_new = rooms(model, prompts, config.max_gen_len)
    texts = PaddedTexts(model, [prompt for prompt in prompts for _ in range(n)], config, max(n_new))
    unlikely = [0.0] + [-torch.inf] * (n - 1)  # beams start as copies: only the first may be continued
    searches = [Search(n, config.length_penalty, room, [([], start) for start in unlikely]) for room in n_new]
    with cpu_decode(model):
        for _ in range(max(n_new)):
            log_p_RV = texts.repetition.applied(texts.next_logits().log_softmax(-1))
            rows, tokens = advance(searches, log_p_RV, stop_ids)
            texts.keep_rows(rows)
            texts.append(tokens)
            if all(search.done for search in searches):
                break
    return [search.ranked() for search in searches]


def advance(searches: Sequence[Search], log_p_RV: Tensor, stop_ids: Collection[int]) -> tuple[Tensor, Tensor]:
    """Every search one token on: the row that each new row continues, and its token."""
    n, vocab_size = searches[0].n_beams, log_p_RV.shape[-1]
    before_BN = torch.tensor([[p for _, p in search.live] for search in searches], device=log_p_RV.device)
    total_BC = (before_BN.flatten()[:, None] + log_p_RV).view(len(searches), n * vocab_size)
    best = total_BC.topk(min(total_BC.shape[1], n * (1 + max(1, len(stop_ids)))), dim=-1)  # n at least are no stops
    rows, tokens = [], []
    for number, search in enumerate(searches):
        places, scores = best.indices[number].tolist(), best.values[number].tolist()
        candidates = [(place // vocab_size, place % vocab_size, s) for place, s in zip(places, scores, strict=True)]
        taken = [(beam, 0) for beam in range(n)] if search.done else search.step(candidates, stop_ids)
        rows += [number * n + beam for beam, _ in taken]
        tokens += [token for _, token in taken]
    return torch.tensor(rows, device=log_p_RV.device), torch.tensor(tokens, device=log_p_RV.device)
