"""Flags of the training tasks and of what only some of them use. Nothing heavy is imported here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from open_lm.errors import ConfigError
from open_lm.flags import flag
from open_lm.registry import Registry

PREFERENCE_LOSSES = Registry(
    "preference loss",
    {
        name: f"open_lm.post_training.preference_losses:{name.replace('-', '_')}"
        for name in ("dpo", "dpo-norm", "cdpo", "robust", "ipo", "hinge", "simpo", "orpo")
    },
)
WITHOUT_REFERENCE = ("simpo", "orpo")
"""Losses that look at the trained model alone."""

TASKS = Registry(
    "task",
    {
        "pretrain": "open_lm.post_training.tasks:PRETRAIN",
        "sft": "open_lm.post_training.sft:SFT",
        **dict.fromkeys((*PREFERENCE_LOSSES, "kto"), "open_lm.post_training.preferences:PREFERENCES"),
        "reward": "open_lm.post_training.reward_model:REWARD",
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
        "Objective. pretrain: predict every token; sft: the answers of conversations; dpo, dpo-norm, cdpo, robust, "
        "ipo, hinge, simpo, orpo, kto: prefer chosen to rejected answers; reward: a reward model of such pairs.",
        choices=TASKS,
    )
    neftune_alpha: float = flag(
        0.0,
        "With --task sft: uniform noise of ± this / sqrt(sequence length x width) on the embeddings while training "
        "(NEFTune, arXiv:2310.05914); 0 is off, 5 is usual.",
        least=0,
    )


@dataclass(frozen=True)
class PreferenceConfig:
    """Preferences and reward models"""

    beta: float | None = flag(
        None,
        "How strongly the loss keeps the model at its reference. None: 0.1; for dpo-norm, whose log-probabilities are "
        "means per token, 5; for simpo 2. Sums over tokens: dpo, cdpo, robust, hinge, kto; means: dpo-norm, ipo, "
        "simpo, orpo.",
        above=0,
    )
    label_smoothing: float | None = flag(
        None, "Share of pairs that cdpo and robust take to be labelled the wrong way round. None: 0.1.", least=0
    )
    simpo_gamma: float = flag(0.5, "Margin that simpo asks for between both sides.", least=0)
    desirable_weight: float = flag(1.0, "What chosen answers count in kto.", least=0)
    undesirable_weight: float = flag(1.0, "What rejected answers count in kto.", least=0)
    reference: str | None = flag(
        None,
        "Weights of the reference model: anything that --pretrained takes. None: with --lora-rank the model with its "
        "adapter off, else those of --pretrained.",
    )
    reference_log_probs: str | None = flag(
        None,
        "File that `python -m open_lm.post_training.reference_log_probs` made of the same weights and data, instead of "
        "a reference model in memory.",
    )
    reward_centring: float = flag(
        0.0, "With --task reward: weight of the squared sum of both rewards, which keeps their mean at 0.", least=0
    )

    def __post_init__(self) -> None:
        if self.label_smoothing is not None and self.label_smoothing >= 0.5:
            raise ConfigError(f"--label-smoothing {self.label_smoothing}: at 0.5 and above the labels say nothing.")
        if self.reference and self.reference_log_probs:
            raise ConfigError("--reference and --reference-log-probs: give one of the two.")

    def beta_or(self, default: float) -> float:
        """--beta, or what the loss uses without it."""
        return default if self.beta is None else self.beta

    def smoothing_or(self, default: float) -> float:
        """--label-smoothing, or what the loss uses without it."""
        return default if self.label_smoothing is None else self.label_smoothing
