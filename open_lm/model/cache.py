"""The keys and values of positions already seen.

Shapes: B batch, S positions, G heads of keys and values, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KeyValue = tuple[Tensor, Tensor]


class LayerCache:
    """One layer's keys and values in a list that grows by concatenation: any number of further positions."""

    def __init__(self, past: KeyValue | None = None):
        self.past = past

    def append(self, k_BTGK: Tensor, v_BTGK: Tensor) -> KeyValue:
        """Add the keys and values of new positions; returns those of all positions so far."""
        if self.past is not None:
            k_BTGK, v_BTGK = torch.cat((self.past[0], k_BTGK), 1), torch.cat((self.past[1], v_BTGK), 1)
        self.past = (k_BTGK, v_BTGK)
        return self.past


class StaticLayerCache(LayerCache):
    """One layer's keys and values in memory taken once for `max_len` positions: nothing is copied when it grows."""

    def __init__(self, k_BSGK: Tensor, v_BSGK: Tensor):
        super().__init__()
        self._k_BSGK, self._v_BSGK = k_BSGK, v_BSGK
        self.length = 0

    def append(self, k_BTGK: Tensor, v_BTGK: Tensor) -> KeyValue:
        """Write the keys and values of new positions behind the others; returns views of all so far."""
        end = self.length + k_BTGK.shape[1]
        self.memory_for(k_BTGK.shape[1])
        self._k_BSGK[:, self.length : end] = k_BTGK.detach()
        self._v_BSGK[:, self.length : end] = v_BTGK.detach()
        self.length = end
        return self._k_BSGK[:, :end], self._v_BSGK[:, :end]

    def memory_for(self, n_new: int) -> KeyValue:
        """The memory itself, for who appends `n_new` positions there and adds them to `length`."""
        end = self.length + n_new
        assert end <= self._k_BSGK.shape[1], f"{end} positions in a cache for {self._k_BSGK.shape[1]}"
        return self._k_BSGK, self._v_BSGK

    def reorder(self, rows: Tensor) -> None:
        """Let row i continue what row `rows[i]` has seen."""
        for memory in (self._k_BSGK, self._v_BSGK):
            memory[:, : self.length] = memory[rows, : self.length]


class StaticCache:
    """A KV cache of fixed size: memory for `batch` rows of `max_len` positions, allocated once.

    `key_shape` is (G, K), the heads of keys and values and their width. Give the cache to a Transformer as
    `past_key_values`; each forward pass appends to it. It carries no gradients.
    """

    def __init__(
        self,
        n_layers: int,
        batch: int,
        max_len: int,
        key_shape: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
    ):
        shape = (batch, max_len, *key_shape)

        def memory() -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        self.layers = [StaticLayerCache(memory(), memory()) for _ in range(n_layers)]

    @property
    def length(self) -> int:
        """Positions seen so far."""
        return self.layers[0].length

    def reorder(self, rows: Tensor) -> None:
        """Let row i of the batch continue what row `rows[i]` has seen, as beam search needs."""
        for layer in self.layers:
            layer.reorder(rows)


class GrowingCache:
    """The same over `past_key_values` given as one `(keys, values)` per layer, each (B, S, G, K); None starts empty."""

    def __init__(self, past_key_values: Sequence[KeyValue] | None, n_layers: int):
        self.layers = [LayerCache((past[0], past[1])) for past in past_key_values or []] or [
            LayerCache() for _ in range(n_layers)
        ]
        assert len(self.layers) == n_layers, f"{len(self.layers)} past_key_values for {n_layers} layers"
        self.length = past_key_values[0][0].shape[1] if past_key_values else 0

    def key_values(self) -> list[KeyValue | None]:
        """`past_key_values` for the next forward pass."""
        return [layer.past for layer in self.layers]
