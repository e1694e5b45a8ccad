"""Flags of the training tasks and of what only some of them use. Nothing heavy is imported here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from open_lm.errors import ConfigError
from open_lm.flags import Registry, flag

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
        "grpo": "open_lm.post_training.policy:GRPO",
        "rloo": "open_lm.post_training.policy:RLOO",
        "ppo": "open_lm.post_training.policy:PPO",
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
    lora_base: str = flag(
        "full",
        "How the frozen weights under adapters are held: full, as the model has them, or nf4, in 4 bits with a scale "
        "for every 64 (QLoRA, arXiv:2305.14314): an eighth of the memory of fp32, slower steps.",
        choices=("full", "nf4"),
    )
    dora: bool = flag(False, "Also train the length of each row of the adapted weights (DoRA).")
    rslora: bool = flag(False, "Scale adapters by alpha / sqrt(rank) (rank-stabilised LoRA).")

    def __post_init__(self) -> None:
        if self.lora_from and self.lora_rank:
            raise ConfigError("--lora-from brings its own rank: leave out --lora-rank.")
        for name in ("dora", "rslora", "lora_targets"):
            if getattr(self, name) and self.lora_rank is None:
                raise ConfigError(f"--{name.replace('_', '-')} belongs to adapters: give --lora-rank too.")
        if self.lora_base != "full" and self.lora_rank is None and self.lora_from is None:
            raise ConfigError("--lora-base nf4 holds weights under adapters: give --lora-rank or --lora-from.")
        if self.lora_dropout >= 1:
            raise ConfigError(f"--lora-dropout {self.lora_dropout} is a share: below 1.")

    @property
    def scale(self) -> float:
        """The scale of the product of both matrices."""
        assert self.lora_rank is not None
        return self.lora_alpha / (math.sqrt(self.lora_rank) if self.rslora else self.lora_rank)


@dataclass(frozen=True)
class TaskConfig:
    """Task"""

    task: str = flag(
        "pretrain",
        "Objective. pretrain: predict every token; sft: the answers of conversations; dpo, dpo-norm, cdpo, robust, "
        "ipo, hinge, simpo, orpo, kto: prefer chosen to rejected answers; reward: a reward model of such pairs; "
        "grpo, rloo, ppo: reinforcement learning from rewards of sampled answers.",
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
        "File that `openlm reference-log-probs` made of the same weights and data, instead of "
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


@dataclass(frozen=True)
class RLConfig:
    """Reinforcement learning"""

    prompts: str | None = flag(
        None,
        "prompts.jsonl of openlm prepare-chat --form prompts, its ledger.json beside it; for grpo, rloo and ppo.",
    )
    reward: tuple[str, ...] = flag(
        (),
        "What scores an answer: `module:function`, called with its text and the row of its prompt, or the run or "
        "checkpoint of a --task reward model; several add up. open_lm.post_training.verifiers has some functions.",
    )
    rollout_prompts: int = flag(32, "Prompts answered in one iteration, over all ranks.", least=1)
    group_size: int = flag(8, "Answers sampled to each prompt.", least=1)
    rollout_tokens: int = flag(128, "Tokens of an answer, at most.", least=1)
    rollout_temperature: float = flag(1.0, "Temperature of the sampling, and of every log-probability.", above=0)
    rl_epochs: int = flag(1, "Times that the answers of one iteration are trained on.", least=1)
    rl_minibatches: int = flag(1, "Optimizer steps that the answers of one iteration are spread over.", least=1)
    clip_low: float = flag(0.2, "Probability ratios below 1 - this are clipped.", above=0)
    clip_high: float = flag(0.2, "Probability ratios above 1 + this are clipped.", above=0)
    kl_coefficient: float = flag(0.0, "Weight of the divergence from the reference (--reference); 0: none.", least=0)
    kl_in: str = flag("loss", "Where it counts: in the loss, or in each token's reward.", choices=("loss", "reward"))
    advantage_std: bool = flag(True, "With grpo: divide advantages by the standard deviation of their group.")
    rl_loss_mean: str = flag(
        "tokens",
        "With grpo and ppo: the loss is a mean over tokens, or over answers of their means.",
        choices=("tokens", "sequences"),
    )
    gae_gamma: float = flag(1.0, "With ppo: discount of later rewards.", above=0)
    gae_lambda: float = flag(0.95, "With ppo: share of later errors of the value in an advantage.", least=0)
    value_coefficient: float = flag(0.5, "With ppo: weight of the loss of the value head.", least=0)
    value_clip: float = flag(
        0.2, "With ppo: how far a value moves from the stored one before its loss is clipped.", above=0
    )
    show_rollouts_every: int = flag(
        10, "Iterations between two looks at the answers, in the log and in rollouts.jsonl; 0: never.", least=0
    )

    def __post_init__(self) -> None:
        if (self.rollout_prompts * self.group_size) % self.rl_minibatches:
            raise ConfigError(
                f"--rl-minibatches {self.rl_minibatches} does not divide the {self.rollout_prompts * self.group_size} "
                "answers of --rollout-prompts x --group-size."
            )
        if bool(self.prompts) != bool(self.reward):
            raise ConfigError("--prompts and --reward belong together: what is asked, and what an answer is worth.")

    @property
    def steps_per_iteration(self) -> int:
        """Optimizer steps between two rollouts."""
        return self.rl_epochs * self.rl_minibatches
