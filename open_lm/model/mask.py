"""Attention mask: which keys each query of a forward pass sees, kept as a rule and made dense only in parts.

Shapes: B batch, T queries, S keys. The queries stand at the end of the keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Reach:
    """The keys that a query sees by position alone: all up to its own, or only the last `window` of them.

    Every mask and back end asks these methods, so another shape of attention (arXiv:2004.05150 has several) is a key of
    the architecture and its rule here. The C++ kernel of decoding knows windows: see `cpu_decode.attention`.
    """

    window: int | None = None
    """Keys, the query's own included; None: all."""

    @property
    def is_whole(self) -> bool:
        """Whether every earlier key is seen."""
        return self.window is None

    def among(self, n_keys: int) -> Reach:
        """The same for `n_keys` keys, whole where it hides none of them."""
        return WHOLE if self.window is None or self.window >= n_keys else self

    def rule(self) -> Callable[[Tensor, Tensor], Tensor]:
        """`sees(query, key)` of positions, elementwise; it closes over plain numbers, as flex_attention needs."""
        window = self.window

        def sees(query: Tensor, key: Tensor) -> Tensor:
            seen = key <= query
            return seen if window is None else seen & (key > query - window)

        return sees

    def first_key(self, query: int) -> int:
        """The first key that position `query` sees; later queries see none before it."""
        return 0 if self.window is None else max(0, query - self.window + 1)


WHOLE = Reach()


class Mask:
    """Causal attention, narrowed by position (`reach`), by documents and by padding.

    A query sees itself and the earlier keys in its reach; with `documents_BS` only those of its document; with
    `real_BS` only those that are true there. A query that would see no key at all, as in left padding, sees its own, so
    that its output is finite.

    A plain object on purpose: FSDP casts the tensors that it finds in a block's arguments.
    """

    def __init__(
        self,
        n_queries: int,
        n_keys: int,
        device: torch.device,
        *,
        reach: Reach = WHOLE,
        documents_BS: Tensor | None = None,
        real_BS: Tensor | None = None,
    ):
        self.n_queries, self.n_keys, self.device = n_queries, n_keys, device
        self.reach = reach.among(n_keys)
        self.documents_BS, self.real_BS = documents_BS, real_BS
        self._made: dict[Any, Any] = {}

    @property
    def is_causal(self) -> bool:
        """Whether each query sees all keys up to its own."""
        return self.reach.is_whole and self.documents_BS is None and self.real_BS is None

    @property
    def first_query(self) -> int:
        """The position of the first query among the keys."""
        return self.n_keys - self.n_queries

    def apply(self, attend: Callable[..., Tensor], q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Tensor:
        """The attention of back end `attend` under this mask."""
        return attend(q_BTHK, k_BSGK, v_BSGK, self)

    def dense(self) -> Tensor:
        """True where a query sees a key: (T, S), or (B, 1, T, S) with documents or padding."""
        return self.once("dense", lambda: self.part(slice(0, self.n_queries), slice(0, self.n_keys)))

    def once(self, form: Any, make: Callable[[], T]) -> T:
        """The result of `make`, built by the first layer that asks for this `form` of the mask, kept for the others."""
        if form not in self._made:
            self._made[form] = make()
        return self._made[form]

    def part(self, queries: slice, keys: slice) -> Tensor:
        """The rows `queries` and columns `keys` of the dense mask."""
        first = self.first_query
        places_T1 = torch.arange(first + queries.start, first + queries.stop, device=self.device)[:, None]
        keys_S = torch.arange(keys.start, keys.stop, device=self.device)
        seen = self.reach.rule()(places_T1, keys_S)
        if self.documents_BS is not None:
            of_queries_BT = self.documents_BS[:, first + queries.start : first + queries.stop]
            seen = seen & (of_queries_BT[:, None, :, None] == self.documents_BS[:, None, None, keys])
        if self.real_BS is not None:
            seen = (seen & self.real_BS[:, None, None, keys].bool()) | (keys_S == places_T1)
        return seen

    def keys_seen(self, queries: slice) -> slice:
        """The shortest range of keys outside of which none of `queries` sees any, in any row of the batch."""
        position = self.first_query + queries.start
        start = max(self.reach.first_key(position), self._document_start(position))
        return slice(start, self.first_query + queries.stop)

    def _document_start(self, position: int) -> int:
        """The first key of the document that reaches back furthest among those at `position`; known once per pass."""
        if self.documents_BS is None:
            return 0
        documents_BS = self.documents_BS

        def start() -> int:
            earlier_BS = documents_BS[:, :position] < documents_BS[:, position : position + 1]
            return int(earlier_BS.sum(1).min())

        return self.once(("start", position), start)
