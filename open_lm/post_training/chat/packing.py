"""Best-fit packing: conversations of many lengths into samples of one, in bounded memory."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

import numpy as np

from open_lm.data.marks import PADDING, joined

OPEN_SAMPLES = 1024
"""Samples that wait for more; when there would be more, the fullest is closed."""


def pack(conversations: Iterable[np.ndarray], size: int, n_open: int = OPEN_SAMPLES) -> Iterator[list[np.ndarray]]:
    """The conversations of each sample: every one goes where the least room is left of it (none is longer than `size`).

    Kept to `n_open` waiting samples, the fill is that of best fit over so many at once; each conversation comes out
    once, whole.
    """
    rooms: list[tuple[int, int]] = []  # (room left, number), sorted
    waiting: dict[int, list[np.ndarray]] = {}
    number = 0
    for one in conversations:
        assert len(one) <= size, (len(one), size)
        place = bisect_left(rooms, (len(one), -1))
        if place < len(rooms):
            room, chosen = rooms.pop(place)
        else:
            room, chosen = size, number
            waiting[chosen] = []
            number += 1
        waiting[chosen].append(one)
        if room == len(one):
            yield waiting.pop(chosen)
        else:
            insort(rooms, (room - len(one), chosen))
        if len(waiting) > n_open:
            yield waiting.pop(rooms.pop(0)[1])
    yield from (waiting[chosen] for chosen in sorted(waiting))


def padded(parts: Iterable[np.ndarray], size: int, pad_id: int) -> np.ndarray:
    """Tokens with marks, laid end to end and filled up to `size` with marked padding."""
    tokens = np.concatenate(list(parts))
    n_missing = size - len(tokens)
    filler = joined(np.full(n_missing, pad_id, np.int64), np.full(n_missing, PADDING, np.uint8))
    return np.concatenate([tokens, filler])
