"""Kinds of training tasks: the form of their data, and the parts that their objectives are built from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from open_lm.distributed import World
from open_lm.precision import Precision
from open_lm.train.tasks import Task


@dataclass(frozen=True)
class TaskParts:
    """The parts of a run that an objective may be built from; `flags` has one field per group of flags."""

    flags: Any
    model: nn.Module
    """As the step calls it."""
    next_token: Task
    """The objective of pretraining, with the flags of its own (z-loss, experts, distillation)."""
    world: World
    precision: Precision


@dataclass(frozen=True)
class TaskKind:
    """One value of --task. `rows` are the sequences that one sample of its data holds: 2 for pairs.
    `value_head` says whether the model gets one: `alone`, its output layer not being used, or `beside` that."""

    build: Callable[[TaskParts], Task]
    form: str = "samples"
    rows: int = 1
    value_head: str = ""


PRETRAIN = TaskKind(lambda parts: parts.next_token)
