"""GGUF tokenizer: the vocabulary, merges and pre-tokenizer of a tokenizer.json as llama.cpp reads them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from open_lm.errors import ConfigError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""llama.cpp's kinds of tokens."""

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLITS = {
    LLAMA3: "llama-bpe",
    LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt-2",
}
"""Patterns that split a text, and llama.cpp's name for each."""


NO_TOKENIZER = {"tokenizer.ggml.model": "no_vocab"}
"""The metadata of a file without a tokenizer."""


def gguf_tokenizer(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """The metadata of a Tokenizer for a model of `vocab_size` ids.

    Raises:
        ConfigError: llama.cpp has no tokenizer that splits text in the same way.
    """
    values = json.loads(tokenizer.to_json())
    model = values["model"]
    if model.get("type", "BPE") != "BPE" or not is_byte_level(values) or model.get("byte_fallback"):
        raise ConfigError("--to gguf: the tokenizer is no byte-level BPE. Export without it: --tokenizer none.")
    names, kinds = vocabulary(values, vocab_size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    before, after = put_around(tokenizer)
    bos = tokenizer.special_tokens.get("bos_token")
    begin = (
        before[0] if before else next((number for number, name in enumerate(names) if name == bos), tokenizer.eot_id)
    )
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer_name(values),
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": bool(before),
        "tokenizer.ggml.add_eos_token": after == [tokenizer.eot_id],
        "tokenizer.ggml.bos_token_id": begin,
        "tokenizer.ggml.eos_token_id": tokenizer.eot_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_id,
    }
    template = tokenizer.chat_template
    return metadata | ({"tokenizer.chat_template": template} if template else {})


def put_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and behind a text, however its post-processor is written."""
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(tokenizer.to_json())
    plain, whole = (backend.encode("a", add_special_tokens=added).ids for added in (False, True))
    start = next(n for n in range(len(whole)) if whole[n : n + len(plain)] == plain)
    return whole[:start], whole[start + len(plain) :]


def vocabulary(values: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """The text and the kind of every id; ids that no token has are unused."""
    names, kinds = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size
    for token, number in values["model"]["vocab"].items():
        names[number], kinds[number] = token, NORMAL
    for added in values.get("added_tokens") or []:
        names[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return names, kinds


def is_byte_level(values: Mapping[str, Any]) -> bool:
    """Whether tokens stand for bytes, written as GPT-2 writes them."""
    return any(part["type"] == "ByteLevel" for part in steps(values.get("pre_tokenizer"), "pretokenizers"))


def pre_tokenizer_name(values: Mapping[str, Any]) -> str:
    """llama.cpp's name for the way the tokenizer splits a text.

    Raises:
        ConfigError: it has none that is known here.
    """
    found = steps(values.get("pre_tokenizer"), "pretokenizers")
    byte_level, others = found[-1], found[:-1]
    plain = byte_level["type"] == "ByteLevel" and not byte_level.get("add_prefix_space")
    changed = [step["type"] for step in steps(values.get("normalizer"), "normalizers") if step["type"] != "NFC"]
    if plain and not changed:
        if values.get("normalizer"):
            logging.warning("--to gguf: the tokenizer normalises text to NFC, llama.cpp does not: give it NFC text.")
        if not others and byte_level.get("use_regex", True):
            return "gpt-2"
        kinds, splits_words = [step["type"] for step in others], byte_level.get("use_regex", True)
        if kinds == ["Digits"] and splits_words and others[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split"] and not splits_words:
            pattern = others[0]["pattern"].get("Regex")
            if pattern in SPLITS and others[0]["behavior"] == "Isolated" and not others[0].get("invert"):
                return SPLITS[pattern]
    raise ConfigError(
        "--to gguf: llama.cpp has no name known here for the way this tokenizer splits text "
        f"({json.dumps(values.get('pre_tokenizer'))[:200]}; normalizer {changed or None}). Export without it: "
        "--tokenizer none."
    )


def steps(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The steps of a pre-tokenizer or normalizer, one or a sequence of them."""
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]
