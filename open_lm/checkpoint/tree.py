"""A run's state as nested dicts of tensors and plain values, and the same flattened under `a/b/c` names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

SEPARATOR = "/"
EXTRA_STATE = "companions"
"""The extra state (running averages and such) in a tree: `state.extra_state`, as sharded checkpoints have always called
it."""


def map_tensors(tree: Any, change: Callable[[str, Tensor], Any], *, at: str = "") -> Any:
    """`tree` with every tensor replaced by what `change` makes of its name and itself; the rest stays as it is."""
    if isinstance(tree, Tensor):
        return change(at, tree)
    if isinstance(tree, Mapping):
        return {name: map_tensors(part, change, at=f"{at}{SEPARATOR}{name}") for name, part in tree.items()}
    return tree


def flat(tree: Mapping[str, Any], *, at: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the other values of `tree`, each by its path `a/b/c`."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, part in tree.items():
        path = f"{at}{name}"
        if isinstance(part, Tensor):
            tensors[path] = part
        elif isinstance(part, Mapping) and all(isinstance(key, str) for key in part):
            inner_tensors, inner_values = flat(part, at=path + SEPARATOR)
            tensors |= inner_tensors
            values |= inner_values
        else:
            values[path] = part
    return tensors, values


def nested(items: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dicts that `flat` flattened."""
    tree: dict[str, Any] = {}
    for path, value in items.items():
        *folders, name = path.split(SEPARATOR)
        here = tree
        for folder in folders:
            here = here.setdefault(folder, {})
        here[name] = value
    return tree


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """Every tensor in `tree`."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for part in tree.values():
            yield from tensors_of(part)


class Staging:
    """Host memory that tensors are copied to while a save runs, kept from save to save so that it is mapped once.

    Where tensors are on a GPU it is pinned.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def copied(self, tree: Any) -> Any:
        """`tree` with all tensors, or this rank's shards of them, copied to the host; returns when they are there."""
        copies = map_tensors(tree, self.copy)
        self.finish()
        return copies

    def finish(self) -> None:
        """Return when all copies are there."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()

    @torch.no_grad()
    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor, or this rank's shard of it, on the host; complete after `finish`."""
        tensor = tensor.detach()
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        memory = self._memory.get(name)
        if memory is None or memory.shape != local.shape or memory.dtype != local.dtype:
            memory = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.device.type == "cuda")
            self._memory[name] = memory
        memory.copy_(local, non_blocking=True)
        return on_host(tensor, memory) if isinstance(tensor, DTensor) else memory


def on_host(tensor: DTensor, local: Tensor) -> DTensor:
    """A sharded tensor like `tensor` whose part here is `local`, which is in host memory."""
    shell = DTensor.from_local(
        torch.empty(local.shape, dtype=local.dtype, device=tensor.device),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
    shell._local_tensor = local  # from_local would move it back to the device of the mesh
    return shell
