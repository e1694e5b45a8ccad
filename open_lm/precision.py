"""Number formats of a step: autocast, the type of the weights, and loss scaling behind one interface."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_AUTOCAST = {"amp_bf16": torch.bfloat16, "amp_bfloat16": torch.bfloat16, "fp16": torch.float16}


def as_multiplied(x: Tensor) -> Tensor:
    """`x` in the type that autocast multiplies in: rounded before it is sent, half the bytes travel."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Precision:
    """Precision by name, on one kind of device.

    * `fp32`: everything in fp32.
    * `amp_bf16`, `amp_bfloat16`: fp32 weights, bf16 autocast.
    * `amp`: fp32 weights; fp16 autocast with loss scaling on a GPU, bf16 autocast on a CPU.
    * `fp16`: fp32 weights, fp16 autocast with loss scaling.
    * `bf16`: weights, gradients and optimizer moments in bf16; no autocast.
    """

    def __init__(self, name: str, device_type: str):
        self.name = name
        self.device_type = device_type
        amp = torch.float16 if device_type == "cuda" else torch.bfloat16
        self.autocast_dtype: torch.dtype | None = _AUTOCAST.get(name, amp if name == "amp" else None)
        self.weight_dtype = torch.bfloat16 if name == "bf16" else torch.float32
        scales = self.autocast_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(device_type) if scales else None

    def autocast(self, *, keeps_casts: bool = True) -> contextlib.AbstractContextManager:
        """The context in which a forward pass runs. `keeps_casts`: weights are cast once and kept to the end, for loops
        that use them again and again; a training step would hold a copy of every weight that it recomputes with."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.autocast_dtype, cache_enabled=keeps_casts)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of `loss`, scaled where fp16 needs it."""
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def step(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        clip: Callable[[nn.Module], Tensor],
        accept: Callable[[Tensor], bool] = lambda norm: True,
    ) -> tuple[Tensor, bool]:
        """Clip, take the optimizers' steps and clear the gradients; returns the gradient norm before clipping, and
        whether the step was taken.

        Skipped when `accept(norm)` is false. When scaled gradients overflow, the step is left out too, the loss scale
        falls, and the norm returned is 0.
        """
        if self.scaler is not None:
            for optimizer in optimizers:
                self.scaler.unscale_(optimizer)
        norm = clip(model)
        overflowed = None if self.scaler is None else (~norm.isfinite()).float()
        taken = accept(norm)
        if taken:
            _step_all(optimizers, overflowed)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        if self.scaler is not None:
            self.scaler.update()
            norm = norm.nan_to_num(nan=0.0, posinf=0.0)
        return norm, taken

    @property
    def loss_scale(self) -> float | None:
        """The factor on the loss before the backward pass; None without scaling."""
        return self.scaler.get_scale() if self.scaler else None

    def state_dict(self) -> dict[str, Any]:
        """The state of the loss scaler; empty without one."""
        return self.scaler.state_dict() if self.scaler else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; the empty one of a run without loss scaling is fine."""
        if self.scaler and state:
            self.scaler.load_state_dict(state)


def _step_all(optimizers: Sequence[Optimizer], overflowed: Tensor | None) -> None:
    """Take the steps of all optimizers, or of none where `overflowed` is 1: the norm covers all gradients on all
    ranks. Fused optimizers look at it on the device; others make the host wait for it."""
    fused = [getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in optimizers]
    if overflowed is None or not all(fused):
        if overflowed is None or not overflowed.item():
            for optimizer in optimizers:
                optimizer.step()
        return
    for optimizer in optimizers:
        told: Any = optimizer
        told.grad_scale, told.found_inf = None, overflowed
        optimizer.step()
        del told.grad_scale, told.found_inf
