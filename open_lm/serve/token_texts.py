"""Single tokens for clients: their texts, and the bytes of those that are parts of characters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

UNFINISHED = "\ufffd"


def _byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: itself, where it can be seen."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


BYTE_OF = _byte_of()
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
"""A single byte in vocabularies of Llama's kind."""


class TokenTexts:
    """Texts and bytes of a tokenizer's ids, each computed once."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._before = tokenizer.encode("a")[:1]  # some tokenizers drop the space of a text's first word
        self._n_before = len(tokenizer.decode(self._before))
        self.of = lru_cache(maxsize=1 << 16)(self._of)
        self._n_characters = lru_cache(maxsize=1 << 16)(self._count)

    def n_characters(self, tokens: Sequence[int]) -> int:
        """Characters that begin in tokens."""
        return sum(self._n_characters(token) for token in tokens)

    def _count(self, token: int) -> int:
        text, its_bytes = self.of(token)
        return len(text) if its_bytes is None else sum(byte & 0xC0 != 0x80 for byte in its_bytes)

    def _of(self, token: int) -> tuple[str, list[int] | None]:
        """A token's text and its bytes; a part of a character is written `bytes:\\xe2`, as OpenAI does.

        Tokens without a text of their own (ids beyond the tokenizer, parts of unknown characters) have no bytes.
        """
        text = self._tokenizer.decode([*self._before, token])[self._n_before :]
        if text and UNFINISHED not in text:
            return text, list(text.encode())
        written = self._tokenizer.token_of(token)
        if written and (byte := _BYTE_TOKEN.fullmatch(written)):
            return f"bytes:\\x{byte[1].lower()}", [int(byte[1], 16)]
        if not written or any(character not in BYTE_OF for character in written):
            return text or f"token:{token}", None
        found = [BYTE_OF[character] for character in written]
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found), found
