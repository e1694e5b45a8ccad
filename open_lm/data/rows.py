"""SampleRows: the samples read for one batch, with the proof of which they are."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import xxhash

from open_lm.data.permutations import identity
from open_lm.data.tar import CHECKSUM_MARK

PROOF_BYTES = len(CHECKSUM_MARK) + 16
CHECKED_PART = 64
"""One row in so many has its ids compared with the checksum its writer stored; each slot of a batch in turn."""


_FACTORS, _SHIFT = np.array([0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93], np.uint64), np.uint64(32)


class SampleRows(NamedTuple):
    """Samples (n, seq_len + 1), (row, reason) of the unreadable ones, and what was found beside those read.

    `read_checksum` sums hashes of shard and number of each sample, as its header names it. `stored` (n, 19) are the
    checksums of the ids, as their writer put them into the headers; `widths` the bytes of an id there, 0 where a row
    has no checksum or does not hold all ids.
    """

    tokens: np.ndarray
    unreadable: list[tuple[int, str]]
    read_checksum: int = 0
    stored: np.ndarray | None = None
    widths: np.ndarray | None = None


def shard_ids(urls: list[str]) -> np.ndarray:
    """64 bits that stand for each shard."""
    return np.array([_shard_id(url) for url in urls], np.uint64)


_shard_id = lru_cache(maxsize=1 << 18)(identity)


def read_checksum(shards: np.ndarray, places: np.ndarray) -> int:
    """64 bits that tell which samples were read, in whatever order: number `places` of the shards with these ids.

    The loader computes it again from the plan: a step used the samples it was to use, each of them once.
    """
    hashes = places.astype(np.uint64)
    hashes *= _FACTORS[0]
    hashes ^= hashes >> _SHIFT
    hashes *= _FACTORS[1]
    hashes ^= hashes >> _SHIFT
    hashes *= shards
    return int(hashes.sum(dtype=np.uint64))


def changed_row(tokens: np.ndarray, stored: np.ndarray, widths: np.ndarray, step: int) -> int | None:
    """The first of the rows whose turn it is that does not hold the ids its writer stored; None when all do."""
    for row in range(step % min(CHECKED_PART, len(tokens)), len(tokens), CHECKED_PART):
        width, text = int(widths[row]), stored[row].tobytes()
        if not width or not text.startswith(CHECKSUM_MARK):
            continue
        ids = tokens[row].astype(f"<u{width}")
        if f"{xxhash.xxh3_64_intdigest(ids):016x}".encode() != text[len(CHECKSUM_MARK) :]:
            return row
    return None
