"""Flags of the training tasks and of what only some of them use. Nothing heavy is imported here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from open_lm.errors import ConfigError
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
class AdapterConfig:
    """Adapters"""

    lora_rank: int | None = flag(
        None,
        "Train low-rank adapters of this rank (LoRA) and keep the model's own weights; a learning rate about 10 times "
        "that of full training suits them. None: train the weights.",
        least=1,
    )
    lora_from: str | None = flag(
        None, "Folder of an adapter in PEFT's format to go on training, instead of --lora-rank's new one."
    )
    lora_alpha: float = flag(16.0, "Adapters are scaled by this / rank; with --rslora by this / sqrt(rank).", above=0)
    lora_dropout: float = flag(0.0, "Share of an adapter's inputs that is dropped while training.", least=0)
    lora_targets: tuple[str, ...] = flag(
        (), "Last names of the linear layers that get adapters (in_proj w12 q_proj …). None: all but output and router."
    )
    dora: bool = flag(False, "Also train the length of each row of the adapted weights (DoRA).")
    rslora: bool = flag(False, "Scale adapters by alpha / sqrt(rank) (rank-stabilised LoRA).")

    def __post_init__(self) -> None:
        if self.lora_from and self.lora_rank:
            raise ConfigError("--lora-from brings its own rank: leave out --lora-rank.")
        for name in ("dora", "rslora", "lora_targets"):
            if getattr(self, name) and self.lora_rank is None:
                raise ConfigError(f"--{name.replace('_', '-')} belongs to adapters: give --lora-rank too.")
        if self.lora_dropout >= 1:
            raise ConfigError(f"--lora-dropout {self.lora_dropout} is a share: below 1.")

    @property
    def scale(self) -> float:
        """What the product of both matrices is multiplied by."""
        assert self.lora_rank is not None
        return self.lora_alpha / (math.sqrt(self.lora_rank) if self.rslora else self.lora_rank)


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
