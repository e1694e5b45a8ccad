"""Streaming of generated text: whole characters only, nothing after a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

UNFINISHED = "\ufffd"
"""What decoding gives for the first bytes of a character that the next token completes."""


class Decodes(Protocol):
    """A tokenizer, as far as it is needed here."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        ...


class Stream:
    """One text being written; pass `watch` to `generate`: it ends the text when one of `stops` is complete."""

    def __init__(self, tokenizer: Decodes, stops: Sequence[str] = (), show: Callable[[str], None] | None = None):
        self._tokenizer, self._stops, self._show = tokenizer, stops, show
        self._n_shown = 0

    def watch(self, row: int, tokens: list[int]) -> bool:
        """Show what is certain of the text so far; true when it holds a stop string."""
        text = self._tokenizer.decode(tokens)
        kept = until_stop(text, self._stops)
        if kept != text:
            self._show_up_to(kept)
            return True
        self._show_up_to(text[: len(text) - n_uncertain(text, self._stops)])
        return False

    def finish(self, tokens: Sequence[int]) -> str:
        """Show the rest and return the whole text, up to the stop string."""
        text = until_stop(self._tokenizer.decode(tokens), self._stops)
        self._show_up_to(text)
        return text

    def _show_up_to(self, text: str) -> None:
        if self._show and len(text) > self._n_shown:
            self._show(text[self._n_shown :])
            self._n_shown = len(text)


def until_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the stop string that is the first to be complete in it."""
    found = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(found)[1]] if found else text


def n_uncertain(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end may yet change: an unfinished character, or the beginning of a stop string."""
    beginnings = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    unfinished = len(text) - len(text.rstrip(UNFINISHED))
    return max([unfinished, *beginnings])
