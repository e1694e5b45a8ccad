"""Streaming of generated text: whole characters only, nothing after a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

UNFINISHED = "\ufffd"
"""What decoding gives for the first bytes of a character that the next token completes."""
CONTEXT = 4
"""Tokens before a text that its first is decoded with: some tokenizers drop the space of a text's first word."""


class Decodes(Protocol):
    """A tokenizer, as far as it is needed here."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        ...


class TextStream:
    """One text being written; pass `watch` to `generate`: it ends the text when one of `stops` is complete.

    `before` are the tokens of the prompt. Each token is decoded once or twice, with a few before it, however long the
    text grows.
    """

    def __init__(
        self,
        tokenizer: Decodes,
        stops: Sequence[str] = (),
        show: Callable[[str], None] | None = None,
        before: Sequence[int] = (),
    ):
        self._tokenizer, self._stops, self._show = tokenizer, stops, show
        self._longest_stop = max(map(len, stops), default=0)
        self._certain = ""  # the text of all tokens but those of the window
        self._window = list(before[-CONTEXT:])
        self._window_shown = tokenizer.decode(self._window) if self._window else ""
        self._n_context = len(self._window)
        self._n_taken = self._n_searched = self._n_shown = 0
        self.text = ""
        """All of the text so far, up to the stop string."""
        self.stopped = False

    @property
    def has_stops(self) -> bool:
        """Whether any string ends the text."""
        return bool(self._stops)

    @property
    def n_certain(self) -> int:
        """How many characters of `text` are final."""
        return self._n_shown

    def watch(self, row: int, tokens: list[int]) -> bool:
        """Take a row's tokens; for `generate`."""
        return self.take(tokens)

    def take(self, tokens: Sequence[int]) -> bool:
        """Take the tokens written so far and show what is certain; true when the text holds a stop string."""
        if self._take(tokens):
            return True
        self._show_up_to(len(self.text) - n_uncertain(self.text, self._stops))
        return False

    def finish(self, tokens: Sequence[int]) -> str:
        """Take the last tokens, show the rest and return the whole text, up to the stop string."""
        self._take(tokens)
        self._show_up_to(len(self.text))
        return self.text

    def _take(self, tokens: Sequence[int]) -> bool:
        new, self._n_taken = tokens[self._n_taken :], max(self._n_taken, len(tokens))
        for token in new if not self.stopped else ():
            self._decode(token)
            start = max(0, self._n_searched - self._longest_stop + 1)
            kept = start + len(until_stop(self.text[start:], self._stops))
            self._n_searched = len(self.text)
            if kept < len(self.text):
                self.text, self.stopped = self.text[:kept], True
                self._show_up_to(kept)
                break
        return self.stopped

    def _decode(self, token: int) -> None:
        self._window.append(token)
        decoded = self._tokenizer.decode(self._window)
        self.text = self._certain + decoded[len(self._window_shown) :]
        if not decoded.endswith(UNFINISHED) and len(decoded) > len(self._window_shown):
            self._certain = self.text
            self._window = self._window[self._n_context :]
            self._n_context = len(self._window)
            self._window_shown = self._tokenizer.decode(self._window)

    def _show_up_to(self, end: int) -> None:
        if self._show and end > self._n_shown:
            self._show(self.text[self._n_shown : end])
        self._n_shown = max(self._n_shown, end)


def until_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the stop string that is the first to be complete in it."""
    found = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(found)[1]] if found else text


def n_uncertain(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end may yet change: an unfinished character, or the beginning of a stop string."""
    beginnings = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    unfinished = len(text) - len(text.rstrip(UNFINISHED))
    return max([unfinished, *beginnings])
