"""Stop strings of a text that grows: found in a time per character that does not depend on their length."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


class StopSearch:
    """Progress of a text in each of its stop strings (Knuth, Morris, Pratt).

    `matched` holds, for each stop string, how many of its first characters end the text.
    """

    def __init__(self, stops: Sequence[str], matched: Sequence[int] | None = None):
        self._stops = stops
        self.matched = list(matched) if matched is not None else [0] * len(stops)

    def copy(self) -> StopSearch:
        """Another one of the same text, to look ahead with."""
        return StopSearch(self._stops, self.matched)

    @property
    def n_begun(self) -> int:
        """Characters at the end of the text that may be the beginning of a stop string."""
        return max(self.matched, default=0)

    def find(self, text: str) -> int | None:
        """Take the next characters; returns where in them the stop string that is complete first begins.

        That is below 0 where it began in characters taken before; None while no stop string is complete. Of several
        that end together the longest counts.
        """
        for end, character in enumerate(text, 1) if self._stops else ():
            complete = [len(stop) for n, stop in enumerate(self._stops) if self._advance(n, stop, character)]
            if complete:
                return end - max(complete)
        return None

    def _advance(self, number: int, stop: str, character: str) -> bool:
        borders, n = _borders(stop), self.matched[number]
        while n == len(stop) or (n and stop[n] != character):
            n = borders[n - 1]
        self.matched[number] = n = n + (stop[n] == character)
        return n == len(stop)


@lru_cache(maxsize=1024)
def _borders(stop: str) -> list[int]:
    """For each beginning of `stop` the length of the longest shorter beginning that it also ends with."""
    borders, n = [0] * len(stop), 0
    for end in range(1, len(stop)):
        while n and stop[n] != stop[end]:
            n = borders[n - 1]
        borders[end] = n = n + (stop[n] == stop[end])
    return borders


def until_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the stop string that is the first to be complete in it."""
    begin = StopSearch(stops).find(text)
    return text if begin is None else text[:begin]
