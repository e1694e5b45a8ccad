"""What one checkpoint holds: the state of a run at one step, taken from all ranks, before it becomes files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from open_lm.checkpoint.contents import gather, gather_tensors
from open_lm.checkpoint.when import Kind
from open_lm.distributed import World
from open_lm.precision import Precision


class Companion(Protocol):
    """Something else that must survive a restart, such as a running average of the weights: `<name>_K.pt`.

    What `state_dict` gives under "state_dict", if anything, are weights: such a file loads like an epoch_K.pt.
    """

    def state_dict(self) -> dict[str, Any]:
        """Plain values, and tensors that may be sharded like the model's. Called on every rank."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, each tensor sharded as here. Called on every rank."""
        ...

    def reset(self) -> None:
        """Begin anew from the weights as they are: the checkpoint that they came from holds nothing of this."""
        ...


class Saved(Protocol):
    """What of a training state the checkpoints read and set."""

    model: nn.Module
    optimizers: list[Optimizer]
    precision: Precision
    world: World
    step: int
    tokens: int

    @property
    def companions(self) -> Mapping[str, Companion]: ...

    @property
    def tokens_per_step(self) -> int: ...


@dataclass(frozen=True)
class Snapshot:
    """The state of a run after `step` steps. The tensors are on the CPU of rank 0; other ranks hold none."""

    label: str
    kind: Kind
    step: int
    tokens: int
    weights: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    companions: dict[str, dict[str, Any]]
    stats: Mapping[str, Any]

    @property
    def epoch(self) -> int:
        """The K of the label: 3, or 3 of `3-step120` for a checkpoint inside the fourth interval."""
        return int(self.label.partition("-")[0])

    def payloads(self, name: str, about: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The content of each file, under OpenLM's names; `about` (config and such) goes into each file of weights."""
        head = {"epoch": self.epoch, "name": name, "step": self.step, "tokens": self.tokens}
        weights = {**head, "evaluation_metrics": self.stats["evaluation_metrics"], "state_dict": self.weights, **about}
        scaler = {"scaler": self.scaler} if self.scaler else {}
        return {
            f"epoch_{self.label}.pt": weights,
            f"optimizer_{self.label}.pt": {**head, "optimizer": self.optimizer, **scaler},
            **{f"{kind}_{self.label}.pt": {**head, **state, **about} for kind, state in self.companions.items()},
            f"stats_{self.label}.pt": {**head, **self.stats},
        }

    @property
    def size_bytes(self) -> int:
        """The bytes of all tensors."""
        parts = (self.weights, self.optimizer, self.companions)
        return sum(t.numel() * t.element_size() for part in parts for t in _tensors(part))


def take(state: Saved, *, label: str, kind: Kind, stats: Mapping[str, Any]) -> Snapshot:
    """The state of the run as it is now; every rank must call this."""
    weights, optimizer = gather(state.model, state.optimizers)
    return Snapshot(
        label=label,
        kind=kind,
        step=state.step,
        tokens=state.tokens,
        weights=weights,
        optimizer=optimizer,
        scaler=state.precision.state_dict(),
        companions={name: gather_tensors(part.state_dict()) for name, part in state.companions.items()},
        stats=stats,
    )


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for part in tree.values():
            yield from _tensors(part)
