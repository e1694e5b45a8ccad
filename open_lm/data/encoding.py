"""How many documents become arrays of ids: in batches, huge ones in pieces, an end-of-text id after each."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from open_lm.data.tokenizers import Tokenizer

PIECE_CHARACTERS = 1 << 20
"""A longer document is encoded in pieces of about this size: the encoder needs 150 times the memory of its text."""

_WORD_END = re.compile(r"(?<=\w)(?=\s)")
_MARGIN = 2000


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str], dtype: np.dtype) -> list[np.ndarray]:
    """The ids of each text, followed by the end-of-text id; exactly those of the whole text at once."""
    pieces: list[str] = []
    owners: list[int] = []
    for number, text in enumerate(texts):
        parts = [text] if len(text) <= PIECE_CHARACTERS else cut_safely(tokenizer, text)
        pieces += parts
        owners += [number] * len(parts)
    documents: list[list[int]] = [[] for _ in texts]
    for number, ids in zip(owners, tokenizer.encode_batch(pieces), strict=True):
        documents[number] = documents[number] + ids if documents[number] else ids
    return [np.array([*ids, tokenizer.eot_id], dtype) for ids in documents]


def cut_safely(tokenizer: Tokenizer, text: str, piece: int = PIECE_CHARACTERS) -> list[str]:
    """`text` in pieces whose ids, joined, are those of the whole.

    A cut is made where a word ends, and only where encoding the surroundings in two gives the ids of encoding them at
    once. Where no such place is found, the piece goes on.
    """
    pieces, start = [], 0
    while len(text) - start > piece:
        cut = _safe_cut(tokenizer, text, start + piece)
        if cut is None:
            break
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]


def _safe_cut(tokenizer: Tokenizer, text: str, near: int) -> int | None:
    for tried, match in enumerate(_WORD_END.finditer(text, near)):
        cut = match.start()
        left, right = text[max(0, cut - _MARGIN) : cut], text[cut : cut + _MARGIN]
        whole, one, two = tokenizer.encode_batch([left + right, left, right])
        if whole == one + two:
            return cut
        if tried >= 100:
            return None
    return None
