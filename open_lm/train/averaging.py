"""Running averages of the weights, kept beside them in fp32 and spread over the ranks as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from open_lm.train.averagers import AveragerSpec


class WeightAverage:
    """One average of a model's weights, updated after steps; exact across a save and a restore at any world size."""

    def __init__(self, spec: AveragerSpec, model: nn.Module):
        self.spec = spec
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        self._n = 0
        self._averages = [_local(p).float().clone() for p in model.parameters()]

    @property
    def name(self) -> str:
        return self.spec.name

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after `step` steps, where they are due."""
        if step % self.spec.every_n_steps:
            return
        self._n += 1
        newest = [_local(p).float() for p in self._model.parameters()]
        torch._foreach_lerp_(self._averages, newest, self.spec.share(self._n))

    @contextlib.contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """Within the block the model computes with the average."""
        self._reshard()
        kept = [_local(p).clone() for p in self._model.parameters()]
        self._write(self._averages)
        try:
            yield
        finally:
            self._reshard()
            self._write(kept)

    def _reshard(self) -> None:
        """Let go of parameters that FSDP keeps whole after a forward pass without a backward one."""
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _write(self, tensors: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, tensor in zip(self._model.parameters(), tensors, strict=True):
                _local(parameter).copy_(tensor)

    def state_dict(self) -> dict[str, Any]:
        """Number of weights added, and the average by name, spread over the ranks as the weights are.

        The model's buffers and the second names of tied weights are in it too, so that it is a whole model.
        """
        average_of = {id(p): a for p, a in zip(self._model.parameters(), self._averages, strict=True)}
        every_name = self._model.named_parameters(remove_duplicate=False)
        averages = {name: _like(p, average_of[id(p)]) for name, p in every_name}
        return {"n": self._n, "state_dict": {**self._model.state_dict(), **averages}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave; a file of OpenLM does not say how many weights it has averaged, only at
        which step."""
        self._n = state["n"] if "n" in state else int(state.get("step", 0)) // self.spec.every_n_steps
        for (name, _), average in zip(self._model.named_parameters(), self._averages, strict=True):
            average.copy_(_local(state["state_dict"][name]))

    @torch.no_grad()
    def reset(self) -> None:
        """Restart from the current weights."""
        self._n = 0
        for parameter, average in zip(self._model.parameters(), self._averages, strict=True):
            average.copy_(_local(parameter))


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(parameter: Tensor, local: Tensor) -> Tensor:
    """`local` as this rank's part of a tensor that is spread like `parameter`."""
    if not isinstance(parameter, DTensor):
        return local
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(local, mesh, placements, shape=parameter.shape, stride=parameter.stride())
