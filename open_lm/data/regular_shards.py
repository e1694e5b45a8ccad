"""Shards whose samples are all alike: known by number as arrays, read side by side into one table of bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from open_lm.data.manifest import Shard
from open_lm.data.rows import shard_ids
from open_lm.data.shards import ShardIndex


class RegularShards:
    """Facts of shards by number, as arrays, so that a batch of samples of one form is recognised at once."""

    def __init__(self, shards: Sequence[Shard]):
        self._shards = shards
        self._kind_of = np.full(len(shards), -1, np.int32)
        self._kinds: list[tuple[str, tuple[int, int, int]]] = []
        self._ids, self._has_id = np.zeros(len(shards), np.uint64), np.zeros(len(shards), bool)
        self.first_numbers = np.full(len(shards), -1, np.int64)

    def note(self, number: int, index: ShardIndex) -> None:
        """Remember the layout of a shard whose samples are all alike."""
        first = self._shards[number].first_number
        self.first_numbers[number] = -1 if first is None else first
        if index.layout is not None:
            kind = (index.key, index.layout)
            if kind not in self._kinds:
                self._kinds.append(kind)
            self._kind_of[number] = self._kinds.index(kind)

    def common(self, which: np.ndarray) -> tuple[str, tuple[int, int, int]] | None:
        """Key and layout of all these shards, where they are known and the same."""
        kinds = self._kind_of[which]
        if not len(kinds) or kinds[0] < 0 or (kinds != kinds[0]).any():
            return None
        return self._kinds[int(kinds[0])]

    def ids_of(self, which: np.ndarray) -> np.ndarray:
        """64 bits that stand for each shard."""
        if not self._has_id[which].all():
            new = np.unique(which[~self._has_id[which]])
            self._ids[new] = shard_ids([self._shards[number].url for number in new.tolist()])
            self._has_id[new] = True
        return self._ids[which]


class ByteTable:
    """A table of bytes that is used for batch after batch, with a view of each row."""

    def __init__(self) -> None:
        self._whole = np.zeros((0, 0), np.uint8)
        self.views: list[memoryview] = []

    def of(self, n_rows: int, width: int) -> np.ndarray:
        """Its first `n_rows` rows of `width` bytes, each beginning at a multiple of 8."""
        stride = -(-width // 8) * 8
        if self._whole.shape[1] != stride or len(self._whole) < n_rows or len(self.views[0]) != width:
            self._whole = np.zeros((n_rows, stride), np.uint8)
            self.views = [memoryview(row)[:width] for row in self._whole]  # type: ignore[arg-type]
        return self._whole[:n_rows, :width]

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()  # type: ignore[misc]
