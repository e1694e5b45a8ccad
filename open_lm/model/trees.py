"""Token trees: sequences that begin alike run together, each distinct beginning once.

Shapes: N nodes of all trees of a forward pass, B trees of a group, L nodes of its largest tree, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from open_lm.model.cache import KeyValue, LayerCache
from open_lm.model.mask import Mask, Reach

PADDED_SHARE = 4
"""Trees whose attention is computed together are padded by at most this part of the smallest."""
FEW_NODES = 8
"""Or by so many nodes."""


@dataclass(frozen=True)
class TokenTree:
    """Sequences as one tree, its nodes depth first: below a node stands what follows the text that ends there.

    `depths` are the nodes' positions in their sequences; node n has below it those from n + 1 to before `ends[n]`.
    """

    tokens: tuple[int, ...]
    depths: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def is_chain(self) -> bool:
        """Whether it is one sequence."""
        return self.depths[-1] == len(self.tokens) - 1


class TreeGroup(NamedTuple):
    """Trees of about one size, whose attention is computed as a batch."""

    rows_BL: slice | Tensor  # noqa: N815  where their nodes stand among all N; a slice where nothing is padded
    real_N: Tensor | None  # noqa: N815  which of the B·L places are nodes; None where all are
    n_trees: int
    mask: Mask


class Trees(LayerCache):
    """Positions and mask of the nodes of `trees`, laid end to end in one row.

    Linear layers get all nodes without padding. To a layer this is a cache that holds nothing.
    """

    def __init__(self, trees: Sequence[TokenTree]):
        super().__init__()
        self.trees = trees

    def positions(self, n_local: int, device: torch.device) -> Tensor:
        """The position of each node in its sequence, (N,)."""
        return torch.tensor([depth for tree in self.trees for depth in tree.depths], device=device)

    def mask(self, n_local: int, device: torch.device, *, reach: Reach, documents_BS: Tensor | None) -> TreesMask:
        """The mask of all nodes."""
        assert documents_BS is None, "trees have no documents"
        return TreesMask(n_local, device, list(self._groups(device, reach)))

    def append(self, k_BTGK: Tensor, v_BTGK: Tensor) -> KeyValue:
        """The keys and values of the nodes themselves."""
        return k_BTGK, v_BTGK

    def _groups(self, device: torch.device, reach: Reach) -> Iterator[TreeGroup]:
        start, first = 0, 0
        for end in range(1, len(self.trees) + 1):
            if end == len(self.trees) or not alike(self.trees[start], self.trees[end]):
                group = self.trees[start:end]
                yield _group(group, first, device, reach)
                start, first = end, first + sum(len(tree.tokens) for tree in group)


def alike(first: TokenTree, other: TokenTree) -> bool:
    """Whether the attention of two trees may be computed in one batch."""
    sizes = sorted((len(first.tokens), len(other.tokens)))
    return first.is_chain == other.is_chain and sizes[1] <= sizes[0] + max(FEW_NODES, sizes[0] // PADDED_SHARE)


def _group(trees: Sequence[TokenTree], first: int, device: torch.device, reach: Reach) -> TreeGroup:
    """The group of `trees`, whose first node is number `first` of all."""
    sizes = torch.tensor([len(tree.tokens) for tree in trees])
    longest, n_nodes = int(sizes.max()), int(sizes.sum())
    mask = Mask(longest, longest, device, reach=reach)
    if not all(tree.is_chain for tree in trees):
        mask = TreeMask(_padded(trees, longest, device), reach)
    if n_nodes == len(trees) * longest:
        return TreeGroup(slice(first, first + n_nodes), None, len(trees), mask)
    places_L = torch.arange(longest)
    real_BL = places_L < sizes[:, None]
    starts_B1 = (first + sizes.cumsum(0) - sizes)[:, None]
    rows_BL = torch.where(real_BL, starts_B1 + places_L, first)
    return TreeGroup(rows_BL.to(device), real_BL.flatten().nonzero()[:, 0].to(device), len(trees), mask)


def _padded(trees: Sequence[TokenTree], longest: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ends and depths of the nodes, (B, L) each; what pads them sees itself alone."""
    places = tuple(range(longest + 1))
    ends = [tree.ends + places[len(tree.tokens) + 1 :] for tree in trees]
    depths = [tree.depths + places[len(tree.tokens) : longest] for tree in trees]
    return torch.tensor(ends, device=device), torch.tensor(depths, device=device)


class TreeMask(Mask):
    """Of each node of B trees, the nodes on its way from the root: those that come before it and end after it."""

    def __init__(self, ends_and_depths_BL: tuple[Tensor, Tensor], reach: Reach):
        self.ends_BL, self.depths_BL = ends_and_depths_BL
        longest = self.ends_BL.shape[1]
        super().__init__(longest, longest, self.ends_BL.device, reach=reach)

    @property
    def is_causal(self) -> bool:
        return False

    def part(self, queries: slice, keys: slice) -> Tensor:
        """The rows `queries` and columns `keys` of the dense mask, (B, 1, T, S); kept for the other layers."""
        return self.once((queries.start, queries.stop, keys.start, keys.stop), lambda: self._part(queries, keys))

    def _part(self, queries: slice, keys: slice) -> Tensor:
        queries_T1 = torch.arange(queries.start, queries.stop, device=self.device)[:, None]
        keys_S = torch.arange(keys.start, keys.stop, device=self.device)
        above_BTS = (keys_S <= queries_T1) & (queries_T1 < self.ends_BL[:, None, keys])
        near_BTS = self.reach.rule()(self.depths_BL[:, queries, None], self.depths_BL[:, None, keys])
        return (above_BTS & near_BTS)[:, None]

    def keys_seen(self, queries: slice) -> slice:
        """All up to the last of the queries: their ways begin at the root."""
        return slice(0, queries.stop)


class TreesMask(Mask):
    """The masks of all trees of a forward pass, group by group."""

    def __init__(self, n_nodes: int, device: torch.device, groups: Sequence[TreeGroup]):
        super().__init__(n_nodes, n_nodes, device)
        self.groups = groups

    @property
    def is_causal(self) -> bool:
        return False

    def apply(self, attend: Callable[..., Tensor], q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Tensor:
        """Attention inside each tree, (1, N, H, K)."""
        mixed = []
        for rows_BL, real_N, n_trees, mask in self.groups:
            parts = [x_1NHK[0, rows_BL] for x_1NHK in (q_BTHK, k_BSGK, v_BSGK)]
            if real_N is None:
                parts = [x_NHK.unflatten(0, (n_trees, -1)) for x_NHK in parts]
            mixed_NHK = attend(*parts, mask).flatten(0, 1)
            mixed.append(mixed_NHK if real_N is None else mixed_NHK[real_N])
        return torch.cat(mixed)[None]
