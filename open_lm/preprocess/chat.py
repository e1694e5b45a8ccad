"""Conversations as samples: one for each answer, its context left of a marker, padding after it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson

from open_lm.data.tokenizer import Tokenizer
from open_lm.preprocess.jsonl import Line, Rejected

ROLES = {"system": "System", "user": "User", "human": "User", "assistant": "Assistant", "gpt": "Assistant"}
ANSWERING = "Assistant"


def messages_of(line: Line) -> list[tuple[str, str]] | Rejected | None:
    """(speaker, text) of each message of one JSON line; None for a blank one.

    Understood: `{"messages": [{"role", "content"}, …]}`, `{"conversations": [{"from", "value"}, …]}`,
    `{"prompt", "response"}` and `{"instruction", "input"?, "output"}`.
    """
    if not (line.content or b"").strip():
        return None
    try:
        row = orjson.loads(line.content or b"")
    except orjson.JSONDecodeError:
        return Rejected("malformed_json")
    found = _pairs(row) if isinstance(row, dict) else None
    if found is None:
        return Rejected("unknown_form")
    if not all(isinstance(role, str) and role in ROLES for role, _ in found):
        return Rejected("unknown_role")
    if not all(isinstance(text, str) for _, text in found):
        return Rejected("not_text")
    turns = [(ROLES[role], text) for role, text in found]
    return turns if any(role == ANSWERING and text for role, text in turns[1:]) else Rejected("no_answer")


def _pairs(row: dict[str, Any]) -> list[tuple[Any, Any]] | None:
    for name, role, text in (("messages", "role", "content"), ("conversations", "from", "value")):
        if isinstance(row.get(name), list):
            messages = row[name]
            whole = all(isinstance(message, dict) and role in message and text in message for message in messages)
            return [(message[role], message[text]) for message in messages] if whole else None
    if "prompt" in row and "response" in row:
        return [("user", row["prompt"]), ("assistant", row["response"])]
    if "instruction" in row and "output" in row:
        given = row.get("input") or ""
        asked = f"{row['instruction']}\n\n{given}" if given else row["instruction"]
        return [("user", asked), ("assistant", row["output"])]
    return None


def answer_samples(
    turns: list[tuple[str, str]], tokenizer: Tokenizer, *, marker_id: int, sample_tokens: int
) -> Iterator[np.ndarray | Rejected]:
    """A sample of `sample_tokens` ids for each answer: all before it, the marker, the answer, end of text, padding."""
    before = ""
    for role, text in turns:
        if role == ANSWERING and text and before:
            prompt, answer = tokenizer.encode_batch([f"{before}{ANSWERING}:", f" {text}"])
            ids = [*prompt, marker_id, *answer, tokenizer.eot_id]
            if len(ids) > sample_tokens:
                yield Rejected("too_long")
            else:
                yield np.array(ids + [tokenizer.pad_id] * (sample_tokens - len(ids)), np.int64)
        before += f"{role}: {text}\n"
