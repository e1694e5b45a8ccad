"""OpenAI's answers: texts, log-probabilities and counts of tokens in the form that their clients read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from open_lm.generation.text import TokenScore
from open_lm.serve.service import Ticket
from open_lm.serve.token_texts import TokenTexts


def usage(tickets: Sequence[Ticket], n: int) -> dict[str, Any]:
    """Counts of tokens; a prompt counts once, however many texts follow it."""
    prompt = sum(len(ticket.text.prompt) for ticket in tickets[::n])
    written = sum(len(ticket.text.tokens) for ticket in tickets)
    shared = sum(ticket.text.n_shared for ticket in tickets[::n])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": shared},
    }


def completion_logprobs(
    scores: Sequence[tuple[int, TokenScore | None]], texts_of: TokenTexts, offset: int = 0
) -> dict[str, Any]:
    """`logprobs` of /v1/completions: of tokens with their scores; one without (the first of all) has null.

    `top_logprobs` holds the token itself, too. `offset` is where the first token begins in the text.
    """
    offsets = []
    for token, _ in scores:
        offsets.append(max(0, offset))
        offset += texts_of.n_characters([token])
    return {
        "tokens": [texts_of.of(token)[0] for token, _ in scores],
        "token_logprobs": [None if score is None else score.log_probability for _, score in scores],
        "top_logprobs": [None if score is None else _by_text(score, texts_of) for _, score in scores],
        "text_offset": offsets,
    }


def _by_text(score: TokenScore, texts_of: TokenTexts) -> dict[str, float]:
    found: dict[str, float] = {}
    for token, p in (*score.top, (score.token, score.log_probability)):
        found.setdefault(texts_of.of(token)[0], p)  # of tokens with one text the likeliest stays
    return found


def chat_logprobs(scores: Sequence[TokenScore], texts_of: TokenTexts) -> dict[str, Any]:
    """`logprobs` of /v1/chat/completions."""

    def entry(token: int, p: float) -> dict[str, Any]:
        text, its_bytes = texts_of.of(token)
        return {"token": text, "logprob": p, "bytes": its_bytes}

    return {
        "content": [
            {**entry(score.token, score.log_probability), "top_logprobs": [entry(*one) for one in score.top]}
            for score in scores
        ],
        "refusal": None,
    }
