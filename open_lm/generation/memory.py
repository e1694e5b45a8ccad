"""Slots for texts being written: one interface over the caches of the kinds of models.

Shapes: B rows, T positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from open_lm.model.attention import Attention
from open_lm.model.mamba import Mamba, MambaCache, MambaState
from open_lm.model.slots import SlotCache
from open_lm.model.transformer import Transformer

Head = Callable[..., Any]


class Memory(Protocol):
    """The texts that a model has read, one in each slot."""

    shares: bool
    """Whether a slot can be given the beginning of another."""
    in_blocks: bool
    """Whether a prompt may be read block after block: not where attention depends on the length of what is read."""

    def run(self, slots: Sequence[int], ids_BT: Tensor, head: Head) -> Any:
        """`head(hidden_BTD, output_VD)` of the texts in `slots`, continued by `ids_BT`."""
        ...

    def copy(self, source: int, target: int, n: int) -> None:
        """Give slot `target` the first `n` positions of `source`."""
        ...

    def clear(self, slot: int) -> None:
        """Let a new text begin in `slot`."""
        ...


def memory_of(model: Any, n_slots: int, max_len: int, use_cache: bool = True) -> Memory:
    """The memory that fits `model`, for `n_slots` texts of at most `max_len` positions."""
    if not use_cache:
        return Recomputing(model)
    if isinstance(model, Transformer):
        return Slots(model, n_slots, max_len)
    if isinstance(model, Mamba):
        return States(model)
    return OneByOne(model)


class Slots:
    """Keys and values of a Transformer: all rows of a decoding step in one forward pass."""

    def __init__(self, model: Transformer, n_slots: int, max_len: int):
        weight = model.output.weight
        attentions = [module for module in model.modules() if isinstance(module, Attention)]
        shape = attentions[0].key_shape
        self.model = model
        self.cache = SlotCache(len(attentions), n_slots, max_len, shape, weight.device, weight.dtype)
        self.shares = self.in_blocks = all(attention.is_softmax for attention in attentions)

    def run(self, slots: Sequence[int], ids_BT: Tensor, head: Head) -> Any:
        self.cache.continue_rows(slots, ids_BT.shape[1])
        out = self.model(ids_BT, self.cache, head=head)
        self.cache.advance()
        return out

    def copy(self, source: int, target: int, n: int) -> None:
        self.cache.copy(source, target, n)

    def clear(self, slot: int) -> None:
        self.cache.lengths[slot] = 0


class States:
    """States of a Mamba: rows are put together for a forward pass and taken apart after it."""

    shares, in_blocks = False, True

    def __init__(self, model: Mamba):
        self.model = model
        self._rows: dict[int, list[MambaState]] = {}

    def run(self, slots: Sequence[int], ids_BT: Tensor, head: Head) -> Any:
        cache = self._together([self._rows.get(slot) or self.model.new_cache(1, 0).layers for slot in slots])
        out = self.model(ids_BT, cache, head=head)
        for row, slot in enumerate(slots):
            self._rows[slot] = [self._row(layer, row) for layer in cache.layers]
        return out

    def _together(self, rows: Sequence[list[MambaState]]) -> MambaCache:
        cache = self.model.new_cache(len(rows), 0)
        for number, layer in enumerate(cache.layers):
            layer.inputs = torch.cat([row[number].inputs for row in rows])
            states = [row[number].state for row in rows]
            known = [state for state in states if state is not None]
            assert len(known) in (0, len(states)), "a row that has read nothing runs alone"
            layer.state = torch.cat(known) if known else None
        return cache

    def _row(self, layer: MambaState, row: int) -> MambaState:
        one = MambaState.__new__(MambaState)
        one.inputs = layer.inputs[row : row + 1]
        one.state = None if layer.state is None else layer.state[row : row + 1]
        return one

    def copy(self, source: int, target: int, n: int) -> None:
        raise NotImplementedError("a state holds its whole text")

    def clear(self, slot: int) -> None:
        self._rows.pop(slot, None)


class OneByOne:
    """Any other model with a cache: a cache per text, a forward pass per row."""

    shares, in_blocks = False, True

    def __init__(self, model: nn.Module):
        self.model: Any = model
        self._caches: dict[int, Any] = {}

    def run(self, slots: Sequence[int], ids_BT: Tensor, head: Head) -> Any:
        outs = []
        for row, slot in enumerate(slots):
            if slot not in self._caches:
                self._caches[slot] = self.model.new_cache(1, 0)
            outs.append(self.model(ids_BT[row : row + 1], self._caches[slot], head=head))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def copy(self, source: int, target: int, n: int) -> None:
        raise NotImplementedError("caches of their own share nothing")

    def clear(self, slot: int) -> None:
        self._caches.pop(slot, None)


class Recomputing:
    """No memory: every step reads the whole text again."""

    shares, in_blocks = False, False

    def __init__(self, model: nn.Module):
        self.model: Any = model
        self._texts: dict[int, Tensor] = {}

    def run(self, slots: Sequence[int], ids_BT: Tensor, head: Head) -> Any:
        outs, n_new = [], ids_BT.shape[1]
        for row, slot in enumerate(slots):
            before = self._texts.get(slot, ids_BT[row, :0])
            self._texts[slot] = torch.cat((before, ids_BT[row]))
            outs.append(
                self.model(self._texts[slot][None], head=lambda hidden, weight, **kw: head(hidden[:, -n_new:], weight))
            )
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def copy(self, source: int, target: int, n: int) -> None:
        raise NotImplementedError("there is nothing to copy")

    def clear(self, slot: int) -> None:
        self._texts.pop(slot, None)
