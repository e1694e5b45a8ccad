"""Keys and values of texts of different lengths: a cache of slots, one text in each.

Shapes: N slots, S positions of a slot, B rows of a forward pass, T new positions, G heads of keys and values, K width.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from open_lm.model.cache import KeyValue, LayerCache, StaticCache
from open_lm.model.mask import Mask, Reach


class SlotRows:
    """The rows of one forward pass: their slots and how many positions each of them has already."""

    def __init__(self, slots: Sequence[int], lengths: Sequence[int], n_new: int, device: torch.device):
        self.slots, self.shortest, self.longest, self.n_new = list(slots), min(lengths), max(lengths), n_new
        self.slots_B = torch.tensor(self.slots, device=device)
        self.lengths_B = torch.tensor(list(lengths), device=device)
        first = self.slots[0]
        adjacent = self.slots == list(range(first, first + len(self.slots)))
        self.select: slice | Tensor = slice(first, first + len(self.slots)) if adjacent else self.slots_B


class RowsMask(Mask):
    """The mask of one new position of each row: it sees the keys up to its own, the last of the row."""

    def __init__(self, rows: SlotRows, device: torch.device, reach: Reach):
        super().__init__(1, rows.longest + 1, device, reach=reach)
        self.rows = rows

    @property
    def is_causal(self) -> bool:
        return False

    def part(self, queries: slice, keys: slice) -> Tensor:
        """The columns `keys` of the dense mask, (B, 1, 1, S)."""
        keys_S = torch.arange(keys.start, keys.stop, device=self.device)
        return self.reach.rule()(self.rows.lengths_B[:, None], keys_S)[:, None, None]

    def keys_seen(self, queries: slice) -> slice:
        """The shortest range of keys outside of which no row sees any."""
        return slice(self.reach.first_key(self.rows.shortest), self.n_keys)


class SlotLayerCache(LayerCache):
    """One layer's keys and values in every slot; `rows` says which of them the current forward pass continues."""

    def __init__(self, k_NSGK: Tensor, v_NSGK: Tensor):
        super().__init__()
        self.k_NSGK, self.v_NSGK = k_NSGK, v_NSGK
        self.rows: SlotRows

    def append(self, k_BTGK: Tensor, v_BTGK: Tensor) -> KeyValue:
        """Write new positions behind those of each row; returns all positions of the rows, up to the longest's end."""
        rows, end = self.rows, self.rows.longest + k_BTGK.shape[1]
        for memory_NSGK, new_BTGK in ((self.k_NSGK, k_BTGK), (self.v_NSGK, v_BTGK)):
            if len(rows.slots) == 1:
                memory_NSGK[rows.slots[0], rows.longest : end] = new_BTGK[0]
            else:
                memory_NSGK[rows.slots_B, rows.lengths_B] = new_BTGK[:, 0]
        return self.k_NSGK[rows.select, :end], self.v_NSGK[rows.select, :end]


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros; on a CPU of memory that is taken page by page when it is written to."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # a huge page would take what many slots never write to
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class SlotCache(StaticCache):
    """Memory for `n_slots` texts of at most `max_len` positions, each with its own length; it carries no gradients.

    Before each forward pass `continue_rows` names the slots of its rows: one slot with any number of new positions, or
    several with one each. Afterwards `advance` counts the new positions.
    """

    def __init__(
        self,
        n_layers: int,
        n_slots: int,
        max_len: int,
        key_shape: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.device, self.max_len = device, max_len
        shape = (n_slots, max_len, *key_shape)
        self.layers: list[SlotLayerCache] = [  # type: ignore[assignment]  # zeros: what is masked must be finite
            SlotLayerCache(*(_zeros(shape, device, dtype) for _ in "kv")) for _ in range(n_layers)
        ]
        self.lengths = [0] * n_slots
        self._rows: SlotRows

    def continue_rows(self, slots: Sequence[int], n_new: int) -> None:
        """Let row i of the next forward pass continue the text in `slots[i]` by `n_new` positions."""
        assert n_new == 1 or len(slots) == 1, "several rows grow by one position at a time"
        lengths = [self.lengths[slot] for slot in slots]
        assert max(lengths) + n_new <= self.max_len, f"{max(lengths) + n_new} positions in slots of {self.max_len}"
        self._rows = SlotRows(slots, lengths, n_new, self.device)
        for layer in self.layers:
            layer.rows = self._rows

    def advance(self) -> None:
        """Count the positions that the forward pass has added."""
        for slot in self._rows.slots:
            self.lengths[slot] += self._rows.n_new

    @property
    def length(self) -> int:
        """Positions of the longest of the current rows."""
        return self._rows.longest

    def places(self) -> Tensor:
        """The positions of the new tokens: (T,) of a single row, else (B, 1)."""
        if len(self._rows.slots) == 1:
            return torch.arange(self.length, self.length + self._rows.n_new, device=self.device)
        return self._rows.lengths_B[:, None]

    def mask(self, reach: Reach) -> Mask:
        """Mask of the keys that the new positions see."""
        if len(self._rows.slots) == 1:
            n_new = self._rows.n_new
            return Mask(n_new, self.length + n_new, self.device, reach=reach)
        return RowsMask(self._rows, self.device, reach)

    def copy(self, source: int, target: int, n: int) -> None:
        """Give the text in slot `target` the first `n` positions of that in `source`."""
        for layer in self.layers if source != target else ():
            for memory_NSGK in (layer.k_NSGK, layer.v_NSGK):
                memory_NSGK[target, :n] = memory_NSGK[source, :n]
        self.lengths[target] = n
