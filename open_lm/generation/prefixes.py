"""Prompts that begin alike: which slot holds which blocks of which prompt, so that each is computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def block_keys(prompt: Sequence[int], block: int) -> list[bytes]:
    """A key for each whole block of a prompt, which stands for all tokens up to its end."""
    ids = np.asarray(prompt, np.int64)
    digest, keys = hashlib.blake2b(digest_size=16), []
    for end in range(block, len(ids) + 1, block):
        digest.update(ids[end - block : end].tobytes())
        keys.append(digest.copy().digest())
    return keys


class Prefixes:
    """The slots that hold blocks of prompts. A slot's blocks can be found until another text takes it."""

    def __init__(self) -> None:
        self._slots_of: dict[bytes, dict[int, None]] = {}  # in the order in which they came
        self._keys_of: dict[int, list[bytes]] = {}

    def find(self, key: bytes) -> int | None:
        """A slot that holds the block and all before it."""
        return next(iter(self._slots_of.get(key, ())), None)

    def add(self, slot: int, key: bytes) -> None:
        """Note that `slot` holds the block and all before it."""
        self._keys_of.setdefault(slot, []).append(key)
        self._slots_of.setdefault(key, {})[slot] = None

    def take(self, slot: int, keys: Sequence[bytes] = ()) -> int:
        """Note that another text takes `slot`; returns how many of its blocks `keys` the slot holds already."""
        held = self._keys_of.pop(slot, [])
        n_kept = 0
        while n_kept < min(len(held), len(keys)) and held[n_kept] == keys[n_kept]:
            n_kept += 1
        for key in held[n_kept:]:
            slots = self._slots_of[key]
            del slots[slot]
            if not slots:
                del self._slots_of[key]
        self._keys_of[slot] = held[:n_kept]
        return n_kept
