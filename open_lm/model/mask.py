"""Attention mask: which keys each query of a forward pass sees, kept as a rule and made dense only in parts.

Shapes: B batch, T queries, S keys. The queries stand at the end of the keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Mask:
    """Causal attention, narrowed by a sliding window, by documents and by padding.

    A query sees itself and earlier keys; with `window` W only the last W of them, itself included (arXiv:2004.05150);
    with `documents_BS` only those of its document; with `real_BS` only those that are true there. A query that would
    see no key at all, as in left padding, sees its own, so that its output is finite.

    A plain object on purpose: FSDP casts the tensors that it finds in a block's arguments.
    """

    def __init__(
        self,
        n_queries: int,
        n_keys: int,
        device: torch.device,
        *,
        window: int | None = None,
        documents_BS: Tensor | None = None,
        real_BS: Tensor | None = None,
    ):
        self.n_queries, self.n_keys, self.device = n_queries, n_keys, device
        self.window = window if window is not None and window < n_keys else None
        self.documents_BS, self.real_BS = documents_BS, real_BS
        self._made: dict[Any, Any] = {}

    @property
    def is_causal(self) -> bool:
        """Whether each query sees all keys up to its own."""
        return self.window is None and self.documents_BS is None and self.real_BS is None

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
        seen = keys_S <= places_T1
        if self.window is not None:
            seen = seen & (keys_S > places_T1 - self.window)
        if self.documents_BS is not None:
            of_queries_BT = self.documents_BS[:, first + queries.start : first + queries.stop]
            seen = seen & (of_queries_BT[:, None, :, None] == self.documents_BS[:, None, None, keys])
        if self.real_BS is not None:
            seen = (seen & self.real_BS[:, None, None, keys].bool()) | (keys_S == places_T1)
        return seen

    def keys_seen(self, queries: slice) -> slice:
        """The shortest range of keys outside of which none of `queries` sees any, in any row of the batch."""
        position = self.first_query + queries.start
        start = 0 if self.window is None else max(0, position - self.window + 1)
        return slice(max(start, self._document_start(position)), self.first_query + queries.stop)

    def _document_start(self, position: int) -> int:
        """The first key of the document that reaches back furthest among those at `position`; known once per pass."""
        if self.documents_BS is None:
            return 0
        documents_BS = self.documents_BS

        def start() -> int:
            earlier_BS = documents_BS[:, :position] < documents_BS[:, position : position + 1]
            return int(earlier_BS.sum(1).min())

        return self.once(("start", position), start)
