"""Permutations of samples made of hashes: the same for ever, on every machine and with every version of numpy."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
STRIDE = np.uint64(0xD1B54A32D192ED03)
_LAST = np.uint64(0xFFFFFFFFFFFFFFFF)
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_KEPT_VALUES = 16 << 20
_BLOCKS_AT_ONCE = 64


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer: uint64 in, scattered uint64 out. Fixed for ever; numpy's own generators may change."""
    x = values + _GOLDEN
    shifted = x >> _SHIFTS[0]
    x ^= shifted
    x *= _FACTORS[0]
    np.right_shift(x, _SHIFTS[1], out=shifted)
    x ^= shifted
    x *= _FACTORS[1]
    np.right_shift(x, _SHIFTS[2], out=shifted)
    x ^= shifted
    return x


def key(*parts: object) -> np.uint64:
    """64 bits that stand for a readable tuple."""
    return np.uint64(int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little"))


def identity(name: str) -> int:
    """64 bits that stand for a shard, whatever its place in the manifest."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "little")


def argsort(hashes: np.ndarray) -> np.ndarray:
    """np.argsort(hashes, kind="stable"), faster: numpy sorts 16 bits by counting, so their upper 48 in three rounds."""
    order = np.argsort((hashes >> np.uint64(16)).astype(np.uint16), kind="stable")
    for shift in (32, 48):
        order = order[np.argsort((hashes >> np.uint64(shift)).astype(np.uint16)[order], kind="stable")]
    upper = hashes[order] >> np.uint64(16)
    return np.argsort(hashes, kind="stable") if (upper[1:] == upper[:-1]).any() else order


def permutations(keys: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """A permutation of `lengths[k]` places for each key, filled up to `width` with the places that are left.

    It is the stable argsort of hashes. numpy sorts much faster than it argsorts, so the place takes the lowest bits of
    each hash; where two hashes differ in these bits only, they are argsorted.
    """
    places, low = np.arange(width, dtype=np.uint64), np.uint64((1 << (width - 1).bit_length()) - 1)
    hashes = mix(keys[:, None] + places * STRIDE)
    hashes[places >= lengths[:, None].astype(np.uint64)] = _LAST
    packed = hashes & ~low
    packed |= places
    packed.sort(axis=1)
    alike = (packed[:, 1:] ^ packed[:, :-1]) <= low
    alike &= (packed[:, 1:] | low) != _LAST
    if alike.any():
        return np.argsort(hashes, axis=1, kind="stable")
    packed &= low
    return packed


class Permutations:
    """Permutations of shuffle blocks of up to `width` samples, computed many at a time, the latest ones kept."""

    def __init__(self, width: int):
        self._width, self._room = width, max(4, _KEPT_VALUES // width)
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._table = np.empty((0, width), np.uint16 if width <= 65536 else np.uint32)

    def permuted(self, keys: np.ndarray, lengths: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Shuffled index of `offsets[k]` in the block of key `keys[k]`, which is `lengths[k]` samples long."""
        names = keys.tolist()
        known = self._slots
        try:
            slots = [known[name] for name in names]
        except KeyError:
            if len(set(names)) > self._room:
                half = len(names) // 2
                parts = [slice(None, half), slice(half, None)]
                return np.concatenate([self.permuted(keys[p], lengths[p], offsets[p]) for p in parts])
            self._compute(names, keys, lengths)
            slots = [known[name] for name in names]
        return self._table[slots, offsets].astype(np.int64)

    def _compute(self, names: list[int], keys: np.ndarray, lengths: np.ndarray) -> None:
        first = {name: k for k, name in reversed(list(enumerate(names)))}
        for name in first:
            if name in self._slots:
                self._slots.move_to_end(name)  # needed now: others give way
        missing = [name for name in first if name not in self._slots]
        for start in range(0, len(missing), _BLOCKS_AT_ONCE):
            part = missing[start : start + _BLOCKS_AT_ONCE]
            rows = np.array([first[name] for name in part])
            slots = [self._new_slot(name) for name in part]
            self._table[slots] = permutations(keys[rows], lengths[rows], self._width)

    def _new_slot(self, name: int) -> int:
        if len(self._slots) < self._room:
            slot = len(self._slots)
            if slot == len(self._table):
                more = np.empty((min(self._room, max(64, 2 * slot)), self._width), self._table.dtype)
                more[:slot] = self._table
                self._table = more
        else:
            slot = self._slots.popitem(last=False)[1]
        self._slots[name] = slot
        return slot
