"""Split tree: sources interleaved in shares that no short pattern holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_Q_BITS, _LOW_BITS = 32, 20
_Q, _LOW = np.uint64(_Q_BITS), np.uint64(2**_Q_BITS - 1)


class SplitTree:
    """A binary tree of sources for shares that no short pattern holds, exact to 2**-32 of each split.

    At a node with part q on its left, position p goes left when p * q passes a whole number. So every source is spread
    evenly, and is never more than the tree's depth away from its share.
    """

    period = 0

    def __init__(self, weights: Sequence[float]):
        self.shares = np.asarray(weights, np.float64) / np.sum(weights)
        self._part: list[int] = []
        self._children: list[tuple[int, int]] = []
        self._root = self._node(np.argsort(self.shares, kind="stable").tolist())
        self._parts = np.array(self._part, np.int64)
        self._pairs = np.array(self._children, np.int64).reshape(-1, 2)
        self._make_table()

    def _make_table(self) -> None:
        """The tree for `split`: leaves follow the inner nodes, and are their own right children."""
        n_inner, n_leaves = len(self._part), len(self.shares)
        leaves = np.arange(n_inner, n_inner + n_leaves)
        pairs = np.where(self._pairs < 0, n_inner - 1 - self._pairs, self._pairs)  # a leaf is -1 - source
        self._next = np.concatenate([pairs, np.stack([leaves, leaves], 1)])[:, ::-1].reshape(-1).copy()
        self._part_of = np.concatenate([self._parts, np.zeros(n_leaves, np.int64)]).astype(np.uint64)
        self._depth = _depth(self._root, self._children)

    def _node(self, sources: list[int]) -> int:
        """A leaf is -1 - source, another node its number."""
        if len(sources) == 1:
            return -1 - sources[0]
        number, half = len(self._part), len(sources) // 2
        left, right = sources[:half], sources[half:]
        part = float(self.shares[left].sum() / (self.shares[left].sum() + self.shares[right].sum()))
        self._part.append(min(2**_Q_BITS - 1, max(1, round(part * 2**_Q_BITS))))
        self._children.append((0, 0))
        self._children[number] = (self._node(left), self._node(right))
        return number

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not len(positions) or int(positions.max()) >> _Q_BITS:
            return self._split_far(positions)
        own = positions.astype(np.uint64)
        node = np.full(len(positions), max(0, self._root), np.int64)
        for _ in range(self._depth):
            part = self._part_of[node]
            product = own * part
            before = product >> _Q
            left = ((product & _LOW) + part >> _Q).astype(bool)  # whether the next position passes a whole number
            own = np.where(left, before, own - before)
            node = self._next[2 * node + left]
        return node - len(self._part), own.astype(np.int64)

    def _split_far(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `split`, for positions whose product with a part does not fit in 64 bits."""
        own, node = np.array(positions, np.int64), np.full(len(positions), self._root, np.int64)
        inner = np.arange(len(own)) if self._root >= 0 else np.zeros(0, np.int64)
        while len(inner):
            at, p = node[inner], own[inner]
            part = self._parts[at]
            before = _times(p, part)
            left = _times(p + 1, part) > before
            own[inner] = np.where(left, before, p - before)
            node[inner] = self._pairs[at, np.where(left, 0, 1)]
            inner = inner[node[inner] >= 0]
        return -1 - node, own

    def used(self, end: int) -> np.ndarray:
        counts = np.zeros(len(self.shares), np.int64)
        waiting = [(self._root, end)]
        while waiting:
            node, n = waiting.pop()
            if node < 0:
                counts[-1 - node] = n
                continue
            left = n * self._part[node] >> _Q_BITS
            waiting += [(self._children[node][0], left), (self._children[node][1], n - left)]
        return counts


def _depth(node: int, children: Sequence[tuple[int, int]]) -> int:
    return 0 if node < 0 else 1 + max(_depth(child, children) for child in children[node])


def _times(p: np.ndarray, part: np.ndarray) -> np.ndarray:
    """floor(p * part / 2**32) without overflow, for p below 2**51."""
    high, low = p >> _LOW_BITS, p & ((1 << _LOW_BITS) - 1)
    whole = high * part
    rest = (whole & ((1 << (_Q_BITS - _LOW_BITS)) - 1)) << _LOW_BITS
    return (whole >> (_Q_BITS - _LOW_BITS)) + ((rest + low * part) >> _Q_BITS)
