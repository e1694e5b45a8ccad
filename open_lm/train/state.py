"""Training state: all that must survive a restart."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from open_lm.data.batch import HeldPositions
from open_lm.distributed import World
from open_lm.precision import Precision
from open_lm.train.averaging import WeightAverage
from open_lm.train.run_length import RunLength
from open_lm.train.spike_guard import SpikeGuard
from open_lm.train.tasks import Task


@dataclass
class TrainState:
    """Weights, optimizers, loss scale, averages, guard and step are saved; the rest is rebuilt from the flags."""

    model: nn.Module
    """As the step calls it: wrapped for the ranks, compiled, or plain."""
    optimizers: list[Optimizer]
    """Each over its own parameters; most rules need only one."""
    precision: Precision
    lr_at: Callable[[int], float]
    run_length: RunLength
    task: Task
    world: World
    part: HeldPositions | None = None
    """The positions of each sequence that this rank trains on; None: all."""
    averages: list[WeightAverage] = field(default_factory=list)
    guard: SpikeGuard | None = None
    """Skips outlier steps; None takes every step."""
    step: int = 0
    """Optimizer steps taken so far; the data follow from it too."""
    tokens: int = 0
    """Tokens trained on so far."""
    copied: threading.Event = field(default_factory=threading.Event)
    """Set unless a save is still copying all this: whoever changes any of it waits first."""

    def __post_init__(self) -> None:
        self.copied.set()

    @property
    def tokens_per_step(self) -> int:
        return self.run_length.tokens_per_step

    @property
    def extra_state(self) -> dict[str, Any]:
        """Objects saved beside weights and optimizer as `<name>_K.pt`, each an `ExtraPart` of checkpoint.snapshot."""
        guard = {"guard": self.guard} if self.guard else {}
        return {average.name: average for average in self.averages} | guard

    def accept(self, loss_share: Tensor, grad_norm: Tensor) -> bool:
        """Whether to take the step; with a guard this waits for the figures, summed over all ranks."""
        return self.guard is None or self.guard.accept(self.world.sum(loss_share).item(), grad_norm.item())
