"""What the loader hands to the trainer: token ids in, token ids to predict.  Shapes: B samples, T positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100
"""Target of a position that is not trained on: padding, prompts, holes. torch's cross_entropy skips it by default."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch.

    `inputs_BT` are token ids; `targets_BT` the ids that follow them, or `IGNORED`.
    """

    inputs_BT: Tensor  # noqa: N815
    targets_BT: Tensor  # noqa: N815

    @classmethod
    def from_samples(cls, samples_BS: Tensor) -> Batch:
        """Inputs and targets of samples of seq_len + 1 tokens each, shifted by one."""
        return cls(samples_BS[:, :-1], samples_BS[:, 1:])

    @property
    def n_targets(self) -> Tensor:
        """How many positions are trained on: an int64 scalar on the batch's device."""
        return (self.targets_BT != IGNORED).sum()

    @property
    def device(self) -> torch.device:
        return self.inputs_BT.device

    def __len__(self) -> int:
        return self.inputs_BT.shape[0]

    def split(self, n_parts: int) -> Iterator[Batch]:
        """`n_parts` micro-batches of equal size, in order."""
        assert len(self) % n_parts == 0, (len(self), n_parts)
        for inputs, targets in zip(self.inputs_BT.chunk(n_parts), self.targets_BT.chunk(n_parts), strict=True):
            yield Batch(inputs, targets)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; the copy to a GPU goes through pinned memory, so that nothing waits for it."""
        batch = self.pin_memory() if torch.device(device).type == "cuda" and self.device.type == "cpu" else self
        return Batch(batch.inputs_BT.to(device, non_blocking=True), batch.targets_BT.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; torch's DataLoader calls this."""
        return Batch(self.inputs_BT.pin_memory(), self.targets_BT.pin_memory())
