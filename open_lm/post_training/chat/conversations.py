"""Conversations in the forms that chat data sets have: messages, prompt and completion, ShareGPT, preference pairs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from open_lm.preprocess.jsonl import Rejected

Message = dict[str, Any]
ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "model": "assistant", "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
ANSWERING = "assistant"


@dataclass(frozen=True)
class Conversation:
    """Messages, each `{"role", "content"}`; from number `n_given` on, those of the assistant are trained on."""

    messages: list[Message]
    n_given: int = 0


@dataclass(frozen=True)
class ConversationPair:
    """Two continuations of one prompt, and by how much the first is better, where the data say so."""

    chosen: Conversation
    rejected: Conversation
    margin: float = 0.0


@dataclass(frozen=True)
class ConversationPrompt:
    """Messages that the model is to answer, and the row they come from: what a reward may look at."""

    messages: list[Message]
    row: dict[str, Any] = field(default_factory=dict)


def conversation_of(row: dict[str, Any]) -> Conversation | Rejected:
    """The conversation of one row, with at least one answer to train on.

    Understood: `messages` or `conversations` (a list of `role` and `content`, or of `from` and `value`); `prompt` with
    `completion` or `response`, each a text or messages; `instruction`, `input`, `output`.
    """
    found, n_given = _messages_and_prompt(row)
    messages = _checked(found)
    if isinstance(messages, Rejected):
        return messages
    answers = [m for m in messages[n_given:] if m["role"] == ANSWERING]
    if not any(_speaks(message) for message in answers):
        return Rejected("no_answer")
    return Conversation(messages, n_given)


def pair_of(row: dict[str, Any]) -> ConversationPair | Rejected:
    """The preference pair of one row: `chosen` and `rejected`, texts after a `prompt` or whole conversations.

    The messages that both sides begin with are the prompt. `margin`, or the difference of `score_chosen` and
    `score_rejected`, says by how much the first is better.
    """
    if "chosen" not in row or "rejected" not in row:
        return Rejected("unknown_form")
    sides = [_checked(_side(row, name)) for name in ("chosen", "rejected")]
    for side in sides:
        if isinstance(side, Rejected):
            return side
    chosen, rejected = (list(side) for side in sides if not isinstance(side, Rejected))
    if chosen == rejected:
        return Rejected("equal_sides")
    n_given = next(
        (k for k, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    answers = [side[n_given:] for side in (chosen, rejected)]
    if n_given == 0 or not all(any(m["role"] == ANSWERING and _speaks(m) for m in part) for part in answers):
        return Rejected("no_common_prompt" if n_given == 0 else "no_answer")
    margin = _margin(row)
    return ConversationPair(Conversation(chosen, n_given), Conversation(rejected, n_given), margin)


def prompt_of(row: dict[str, Any]) -> ConversationPrompt | Rejected:
    """The prompt of one row: `prompt`, `question` or `instruction`, or messages up to the last that is no answer."""
    if "question" in row and "prompt" not in row and "messages" not in row:
        found: Any = row["question"]
    else:
        found = row.get("prompt")
    if found is None:
        found = _messages_and_prompt({**row, "completion": "-"} if "completion" not in row else row)[0]
    messages = _checked(_as_messages(found, "user"))
    if isinstance(messages, Rejected):
        return messages
    while messages and messages[-1]["role"] == ANSWERING:
        messages = messages[:-1]
    return ConversationPrompt(messages, row) if any(map(_speaks, messages)) else Rejected("no_prompt")


READERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "conversations": conversation_of,
    "pairs": pair_of,
    "prompts": prompt_of,
}
"""`--form NAME` -> what reads a row."""


def _messages_and_prompt(row: dict[str, Any]) -> tuple[Any, int]:
    """The messages of one row as they stand there, None for an unknown form; and how many of them are the prompt."""
    for name in ("messages", "conversations", "conversation"):
        if isinstance(row.get(name), list):
            return row[name], 0
    for question, answer in (("prompt", "completion"), ("prompt", "response"), ("question", "answer")):
        if question in row and answer in row:
            given = _as_messages(row[question], "user")
            said = _as_messages(row[answer], ANSWERING)
            return ([*given, *said], len(given)) if given is not None and said is not None else ([None], 0)
    if "instruction" in row and "output" in row:
        parts = [part for part in (row["instruction"], row.get("input")) if part]
        if not all(isinstance(part, str) for part in parts):
            return [None], 0
        return [{"role": "user", "content": "\n\n".join(parts)}, {"role": ANSWERING, "content": row["output"]}], 1
    return None, 0


def _as_messages(value: Any, role: str) -> list[Any] | None:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return value if isinstance(value, list) else None


def _side(row: dict[str, Any], name: str) -> Any:
    """The messages of one side, the prompt of the row before them where they do not hold it."""
    value = row[name]
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, str) and "prompt" not in row:
        return _spoken(value)
    said = _as_messages(value, ANSWERING)
    given = _as_messages(row.get("prompt"), "user")
    if said is None or given is None:
        return said
    holds_prompt = len(said) > 1 and isinstance(said[0], dict) and _role(said[0]) in ("user", "system")
    return said if holds_prompt else [*given, *said]


def _spoken(text: str) -> list[Message] | None:
    """A dialogue written as one text, `Human:` and `Assistant:` at the beginnings of its paragraphs."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant): ?", text)
    if len(parts) < 3 or parts[0].strip():
        return None
    return [{"role": role.lower(), "content": said} for role, said in zip(parts[1::2], parts[2::2], strict=True)]


def _checked(found: Any) -> list[Message] | Rejected:
    """Messages under the roles that templates know; or why they are none."""
    if found is None:
        return Rejected("unknown_form")
    messages = []
    for message in found:
        content = message.get("content", message.get("value")) if isinstance(message, dict) else None
        if not isinstance(message, dict) or (content is None and "tool_calls" not in message):
            return Rejected("not_text")
        role = _role(message)
        if role not in ROLES:
            return Rejected("unknown_role")
        if not isinstance(content, str | None):
            return Rejected("not_text")
        rest = {key: value for key, value in message.items() if key not in ("role", "from", "content", "value")}
        messages.append({"role": ROLES[role], "content": content or "", **{k: v for k, v in rest.items() if v}})
    return messages


def _role(message: Message) -> Any:
    role = message.get("role", message.get("from"))
    return role if isinstance(role, str) else None


def _speaks(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


def _margin(row: dict[str, Any]) -> float:
    if _is_number(row.get("margin")):
        return float(row["margin"])
    scores = row.get("score_chosen"), row.get("score_rejected")
    return float(scores[0]) - float(scores[1]) if all(map(_is_number, scores)) else 0.0  # type: ignore[arg-type]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
