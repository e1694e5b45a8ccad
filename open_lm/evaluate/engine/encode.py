"""Encoding of prompts: each question as contexts and the continuations to score after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from open_lm.data.tokenizer import Tokenizer
from open_lm.errors import DataError
from open_lm.evaluate.tasks.kinds import TaskPrompt


class PromptEncoder:
    """The ids LLM Foundry would feed a model: the preamble with the tokenizer's special tokens, the rest without."""

    def __init__(self, tokenizer: Tokenizer):
        import tokenizers

        self.tokenizer = tokenizer
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
        self.prefix_space = len(self.plain([" a"])[0]) == 1

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        return [encoding.ids for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def with_special(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text with what the tokenizer puts around it."""
        return [encoding.ids for encoding in self._backend.encode_batch(list(texts), add_special_tokens=True)]

    def text(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def preambles(self, texts: Sequence[str]) -> list[list[int]]:
        """As `with_special`, without an end-of-text token at the end: the question follows."""
        distinct = list(dict.fromkeys(texts))
        eot = self.tokenizer.eot_id
        encoded = [ids[:-1] if len(ids) > 1 and ids[-1] == eot else ids for ids in self.with_special(distinct)]
        ids_of = dict(zip(distinct, encoded, strict=True))
        return [ids_of[text] for text in texts]


@dataclass(frozen=True)
class Choice:
    """One continuation after one context."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """A row ready to be scored; `truncated` when the start of a context had to be cut off to fit."""

    choices: tuple[Choice, ...]
    gold: int
    truncated: bool


def encode_questions(
    asked: Sequence[TaskPrompt], encoder: PromptEncoder, max_seq_len: int, names: Sequence[str]
) -> list[Question]:
    """Every prompt as ids; `names` say where each came from, for messages.

    Raises:
        DataError: a continuation has no tokens, or leaves no room for any context.
    """
    preambles = encoder.preambles([prompt.preamble for prompt in asked])
    contexts = iter(encoder.plain([text for prompt in asked for text in prompt.contexts]))
    continuations = iter(encoder.plain([text for prompt in asked for text in prompt.continuations]))
    questions = []
    for prompt, preamble, name in zip(asked, preambles, names, strict=True):
        before = [(*preamble, *next(contexts)) for _ in prompt.contexts]
        after = [next(continuations) for _ in prompt.continuations]
        pairs = [(context, continuation) for context in before for continuation in after]
        fitted = [_fitted(context, continuation, max_seq_len, name) for context, continuation in pairs]
        cut = any(len(choice.context) < len(context) for choice, (context, _) in zip(fitted, pairs, strict=True))
        questions.append(Question(tuple(fitted), prompt.gold, cut))
    return questions


def _fitted(context: tuple[int, ...], continuation: list[int], max_seq_len: int, name: str) -> Choice:
    """The pair, with the start of the context cut off where both together are too long."""
    room = max_seq_len - len(continuation)
    if not continuation or room < 1:
        raise DataError(
            f"{name}: a continuation of {len(continuation)} tokens, where 1 to {max_seq_len - 1} fit (max_seq_len, at "
            "most the model's context). Remove the row, or evaluate a model with a longer context."
        )
    if not context:
        raise DataError(f"{name}: the context is empty, so nothing predicts the first token. Give it a prompt_string.")
    return Choice(context[-room:], tuple(continuation))  # one that fits is the same tuple in every choice
