"""UTF-8 bytes per token: turns loss per token into bits per byte."""

from __future__ import annotations

import json
import re
from typing import Any

from open_lm.data.tokenizer import Tokenizer

BYTE_FALLBACK = re.compile(r"<0x[0-9A-F]{2}>")
SENTENCE_PIECE = {"Sequence", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
SPACE = "\u2581"


def token_bytes(tokenizer: Tokenizer) -> list[int] | None:
    """The number of UTF-8 bytes that each id contributes to decoded text; None for tokenizers where ids have no own.

    Exact for byte-level BPE (GPT-2, GPT-NeoX, Llama 3): the bytes of a text are the sum over its tokens, also where a
    character is spread over several. For SentencePiece (Llama 2) the space it puts before a text counts as one byte.
    Special tokens, such as the end of text, stand for no text and count 0.
    """
    described = json.loads(tokenizer.to_json())
    kinds = set(_kinds(described.get("decoder")))
    if "ByteLevel" not in kinds and not (kinds and kinds <= SENTENCE_PIECE):
        return None
    added = {
        token["id"]: 0 if token["special"] else len(token["content"].encode()) for token in described["added_tokens"]
    }
    of_text = _byte_level if "ByteLevel" in kinds else _sentence_piece
    tokens = ((i, tokenizer.token_of(i)) for i in range(tokenizer.vocab_size))
    return [added[i] if i in added else of_text(token) if token is not None else 0 for i, token in tokens]


def _kinds(decoder: Any) -> list[str]:
    """The names of a decoder and of those inside it."""
    if not decoder:
        return []
    return [decoder["type"], *(kind for inner in decoder.get("decoders", []) for kind in _kinds(inner))]


def _byte_level(token: str) -> int:
    """Each character stands for one byte."""
    return len(token)


def _sentence_piece(token: str) -> int:
    return 1 if BYTE_FALLBACK.fullmatch(token) else len(token.replace(SPACE, " ").encode())
