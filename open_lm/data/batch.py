"""Batches: input token ids and target token ids.  Shapes: B samples, T positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

IGNORED = -100
"""Target of a position that is not trained on: padding, prompts, holes. torch's cross_entropy skips it by default."""


class HeldPositions(Protocol):
    """The positions of each sequence that one rank holds."""

    def take(self, x_BS: Tensor) -> Tensor:
        """Those of what has all positions along dimension 1."""
        ...


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch.

    `inputs_BT` are token ids; `targets_BT` the ids that follow them, or `IGNORED`. `documents_BT`, where attention must
    not cross documents, numbers the document of each input within its sample. `group` consecutive rows belong together
    (2: the chosen and the rejected side of a pair). `extras` are further tensors by name, one entry for each row:
    log-probabilities, advantages, scores. With `part`, the rows are this rank's positions of sequences that ranks share
    out; documents are those of the whole sequences.
    """

    inputs_BT: Tensor  # noqa: N815
    targets_BT: Tensor  # noqa: N815
    documents_BT: Tensor | None = None  # noqa: N815
    group: int = 1
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    part: HeldPositions | None = None

    @classmethod
    def from_samples(cls, samples_BS: Tensor) -> Batch:
        """Inputs and targets of samples of seq_len + 1 tokens each, shifted by one."""
        return cls(samples_BS[:, :-1], samples_BS[:, 1:])

    def with_documents(self, end_of_text: int) -> Batch:
        """The same batch; each document ends with the token `end_of_text`, the last one with the sample."""
        is_end_BT = (self.inputs_BT == end_of_text).int()
        return replace(self, documents_BT=is_end_BT.cumsum(1, dtype=torch.int32) - is_end_BT)

    @property
    def model_inputs(self) -> dict[str, Any]:
        """The model's arguments beside the ids, by name."""
        given = {"documents_BT": self.documents_BT, "part": self.part}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def n_targets(self) -> Tensor:
        """Number of positions trained on: an int64 scalar on the batch's device."""
        return (self.targets_BT != IGNORED).sum()

    @property
    def device(self) -> torch.device:
        return self.inputs_BT.device

    def __len__(self) -> int:
        return self.inputs_BT.shape[0]

    def split(self, n_parts: int) -> Iterator[Batch]:
        """`n_parts` micro-batches of equal size, in order; groups of rows stay whole."""
        assert len(self) % (n_parts * self.group) == 0, (len(self), n_parts, self.group)
        size = len(self) // n_parts
        for start in range(0, len(self), size):
            yield self._each(lambda tensor: tensor[start : start + size])  # noqa: B023

    def rows(self, order: Tensor) -> Batch:
        """The batch with its rows in another order."""
        return self._each(lambda tensor: tensor[order])

    def trimmed(self, multiple: int = 64) -> Batch:
        """The batch without the columns behind its last target, to a multiple of `multiple`; of a batch on the CPU."""
        columns = (self.targets_BT != IGNORED).any(0).nonzero()
        n_used = int(columns[-1]) + 1 if len(columns) else 1
        width = min(self.inputs_BT.shape[1], -(-n_used // multiple) * multiple)
        inputs_BT, targets_BT = self.inputs_BT[:, :width], self.targets_BT[:, :width]
        documents_BT = None if self.documents_BT is None else self.documents_BT[:, :width]
        return replace(self, inputs_BT=inputs_BT, targets_BT=targets_BT, documents_BT=documents_BT)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; the copy to a GPU goes through pinned memory, so that nothing waits for it."""
        batch = self.pin_memory() if torch.device(device).type == "cuda" and self.device.type == "cpu" else self
        return batch._each(lambda tensor: tensor.to(device, non_blocking=True))

    def of_part(self, part: HeldPositions) -> Batch:
        """This rank's positions of the sequences, where ranks share them out."""
        return replace(self, inputs_BT=part.take(self.inputs_BT), targets_BT=part.take(self.targets_BT), part=part)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; torch's DataLoader calls this."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        documents_BT = None if self.documents_BT is None else change(self.documents_BT)
        extras = {name: change(tensor) for name, tensor in self.extras.items()}
        return Batch(change(self.inputs_BT), change(self.targets_BT), documents_BT, self.group, extras, self.part)
