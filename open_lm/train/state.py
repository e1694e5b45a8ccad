"""What a training run is made of, and all of it that must survive a restart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from open_lm.distributed import World
from open_lm.precision import Precision
from open_lm.train.horizon import Horizon
from open_lm.train.tasks import Task


@dataclass
class TrainState:
    """The weights, the optimizers and the step are saved; the rest is rebuilt from the flags."""

    model: nn.Module
    """As the step calls it: wrapped for the ranks, compiled, or plain."""
    optimizers: list[Optimizer]
    """Each over its own parameters; most rules need only one."""
    precision: Precision
    lr_at: Callable[[int], float]
    horizon: Horizon
    task: Task
    world: World
    step: int = 0
    """Optimizer steps taken so far; the data follow from it too."""
    tokens: int = 0
    """Tokens trained on so far."""

    @property
    def tokens_per_step(self) -> int:
        return self.horizon.tokens_per_step
