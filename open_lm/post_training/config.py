"""Flags of the training tasks and of what only some of them use. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass

from open_lm.flags import flag
from open_lm.registry import Registry

TASKS = Registry(
    "task",
    {
        "pretrain": "open_lm.post_training.tasks:PRETRAIN",
        "sft": "open_lm.post_training.sft:SFT",
    },
)
"""`--task NAME` -> a TaskKind: the form of its data, and the objective it builds."""


@dataclass(frozen=True)
class TaskConfig:
    """Task"""

    task: str = flag(
        "pretrain",
        "Objective. pretrain: predict every token; sft: predict the answers of conversations.",
        choices=TASKS,
    )
    neftune_alpha: float = flag(
        0.0,
        "With --task sft: uniform noise of ± this / sqrt(sequence length x width) on the embeddings while training "
        "(NEFTune, arXiv:2310.05914); 0 is off, 5 is usual.",
        least=0,
    )
