"""Streaming of generated text: whole characters only, nothing after a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from open_lm.generation.stops import StopSearch

UNFINISHED = "\ufffd"
"""The decoded form of a character's first bytes, which the next token completes."""
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
        self._tokenizer, self._show, self.has_stops = tokenizer, show, bool(stops)
        self._search = StopSearch(stops)  # in the certain text
        self._certain = ""  # the text of all tokens but those of the window
        self._window = list(before[-CONTEXT:])
        self._window_shown = tokenizer.decode(self._window) if self._window else ""
        self._n_context = len(self._window)
        self._n_taken = self._n_searched = self._n_shown = self._n_uncertain = 0
        self.text = ""
        """All of the text so far, up to the stop string."""
        self.stopped = False

    @property
    def n_certain(self) -> int:
        """Number of final characters of `text`."""
        return self._n_shown

    def watch(self, row: int, tokens: list[int]) -> bool:
        """Take a row's tokens; for `generate`."""
        return self.take(tokens)

    def take(self, tokens: Sequence[int]) -> bool:
        """Take the tokens written so far and show what is certain; true when the text holds a stop string."""
        if self._take(tokens):
            return True
        self._show_up_to(len(self.text) - self._n_uncertain)
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
            begin = self._stop_begins()
            if begin is not None:
                self.text, self.stopped = self.text[:begin], True
                self._show_up_to(begin)
                break
        return self.stopped

    def _stop_begins(self) -> int | None:
        """The index at which a stop string begins in the text; None if it holds none."""
        n_certain, begin = len(self._certain), self._search.find(self._certain[self._n_searched :])
        if begin is not None:
            return self._n_searched + begin
        self._n_searched, tail = n_certain, self.text[n_certain:]
        ahead = self._search.copy() if tail else self._search
        begin = ahead.find(tail)
        self._n_uncertain = max(len(tail) - len(tail.rstrip(UNFINISHED)), ahead.n_begun)
        return None if begin is None else n_certain + begin

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
