"""Snapshot of a run at one step, gathered from all ranks before it is written."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from open_lm.checkpoint.save_policy import SaveKind
from open_lm.checkpoint.together import problem_of
from open_lm.checkpoint.tree import EXTRA_STATE, Staging, map_tensors
from open_lm.distributed import World
from open_lm.errors import StorageError
from open_lm.precision import Precision
from open_lm.train.row_order import order_of, row_orders, to_file_order


class ExtraPart(Protocol):
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
        """Start fresh from the current weights: the checkpoint that they came from holds nothing of this."""
        ...


class Saved(Protocol):
    """The parts of a training state that checkpoints save and restore."""

    model: nn.Module
    optimizers: list[Optimizer]
    precision: Precision
    world: World
    step: int
    tokens: int
    copied: threading.Event

    @property
    def extra_state(self) -> Mapping[str, ExtraPart]: ...

    @property
    def tokens_per_step(self) -> int: ...


@dataclass(frozen=True)
class Snapshot:
    """The state of a run after `step` steps.

    `tree` holds `weights`, `optimizer` and the extra state: whole on rank 0 and empty elsewhere, or each rank's
    shards.
    """

    label: str
    kind: SaveKind
    step: int
    tokens: int
    tree: dict[str, Any]
    scaler: dict[str, Any]
    stats: Mapping[str, Any]

    @property
    def epoch(self) -> int:
        """The K of the label: 3, or 3 of `3-step120` for a checkpoint inside the fourth interval."""
        return int(self.label.partition("-")[0])

    def payloads(self, name: str, about: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The content of each file, under OpenLM's names; `about` (config and such) goes into each file of weights."""
        head, tree = self.head(name), self.tree
        weights = {**head, "evaluation_metrics": self.stats["evaluation_metrics"], "state_dict": tree["weights"]}
        scaler = {"scaler": self.scaler} if self.scaler else {}
        return {
            f"epoch_{self.label}.pt": {**weights, **about},
            f"optimizer_{self.label}.pt": {**head, "optimizer": tree["optimizer"], **scaler},
            **{f"{part}_{self.label}.pt": {**head, **state, **about} for part, state in tree[EXTRA_STATE].items()},
            f"stats_{self.label}.pt": {**head, **self.stats},
        }

    def head(self, name: str) -> dict[str, Any]:
        """The keys that every file begins with."""
        return {"epoch": self.epoch, "name": name, "step": self.step, "tokens": self.tokens}


def in_file_order(tree: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """`tree` with the rows of every tensor as files have them: under tensor parallelism ranks order some otherwise.

    Every rank must call this.
    """
    orders = row_orders(model)

    def ordered(path: str, tensor: Tensor) -> Tensor:
        order = order_of(path, tensor, orders)
        return tensor if order is None else to_file_order(tensor, order)

    return map_tensors(tree, ordered) if orders else tree


def live(state: Saved) -> dict[str, Any]:
    """The state itself, by name: tensors are not copied, and sharded ones stay so. Every rank must call this."""
    return {
        "weights": get_model_state_dict(state.model),
        "optimizer": _optimizer_state(state),
        EXTRA_STATE: {name: part.state_dict() for name, part in state.extra_state.items()},
    }


def _optimizer_state(state: Saved) -> dict[str, Any]:
    """Moments by name. torch makes missing ones by a step with zero gradients, which must not count as one."""
    is_new = [not optimizer.state for optimizer in state.optimizers]
    found = get_optimizer_state_dict(state.model, state.optimizers)
    for optimizer in (o for o, new in zip(state.optimizers, is_new, strict=True) if new):
        for moments in optimizer.state.values():
            if isinstance(moments.get("step"), Tensor):
                moments["step"].zero_()
    return found


def take(tree: dict[str, Any], *, sharded: bool, is_master: bool, staging: Staging | None) -> dict[str, Any]:
    """This rank's share of the live `tree`, on the host; every rank must call this.

    With `staging` nothing in it changes when training goes on; without, it holds the live tensors where those are on
    the host already.

    Raises:
        StorageError, RuntimeError: there is no memory left for it here; other ranks may not know.
    """
    if sharded:
        return tree if staging is None else staging.copied(tree)
    problems: list[str | None] = []

    def kept(name: str, tensor: Tensor) -> Tensor | None:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # one by one, each freed at once
        copies: list[Tensor] = []
        if is_master and not any(problems):  # with a problem too: the others wait for this rank in the next gather
            copy = partial(staging.copy, name) if staging is not None else _on_cpu
            problems.append(problem_of(lambda: copies.append(copy(whole))))
        return copies[0] if copies else None

    tree = map_tensors(tree, kept)
    if staging is not None:
        staging.finish()
    if problem := next(filter(None, problems), None):
        raise StorageError(problem)
    return tree if is_master else {}


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()
