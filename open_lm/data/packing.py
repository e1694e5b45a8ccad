"""How documents' tokens become samples of equal length, none lost, and how samples get their place in the shuffle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from open_lm.data.plan import key, mix


def pack(pieces: Sequence[np.ndarray], sample_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """All tokens one after the other, cut into samples (n, sample_tokens), and the tail that fills none."""
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, np.uint16)
    n = len(tokens) // sample_tokens
    return tokens[: n * sample_tokens].reshape(n, sample_tokens), tokens[n * sample_tokens :]


def shuffle_keys(n: int, *, seed: int, block: str) -> np.ndarray:
    """uint64 by which the `n` samples of one block are sorted among all: a hash of seed, block name and number."""
    return mix(key("sample", seed, block) ^ mix(np.arange(n, dtype=np.uint64)))
