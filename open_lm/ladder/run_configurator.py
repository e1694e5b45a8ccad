"""Numbers of a ladder run as functions of its parameter count: batch, learning rate, β2, warm-up, length, periods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from open_lm.errors import ConfigError

CHINCHILLA = 20
"""Tokens per parameter that 1×C stands for (arXiv:2203.15556)."""
REFERENCE_PARAMS = 108e6
REFERENCE_BATCH = 2048 * 160
REFERENCE_LR = 0.0047
POST_DECAY = "post-decay"
"""Ends the description of a finished model."""
HIGH_BETA2_BELOW = 524_288
"""Batches of fewer tokens take β2 0.99, for their squared gradients are noisier."""


@dataclass(frozen=True)
class Period:
    """One period of WSD-S, in tokens from the start of the run: it decays from `decay_start` to `end`."""

    number: int
    multiple: float
    start: int
    decay_start: int
    end: int

    @property
    def tokens(self) -> int:
        return self.end - self.start

    @property
    def label(self) -> str:
        """Number and multiple, as checkpoints are called."""
        return f"period {self.number}, {self.multiple:g}×C"


@dataclass(frozen=True)
class RunCheckpointInfo:
    """A checkpoint that the ladder promises: `step` optimizer steps, and what it is for."""

    step: int
    description: str


@dataclass(frozen=True)
class RunNumbers:
    """Everything about a run's optimizer and length that follows from its size and its batch."""

    batch_tokens: int
    peak_lr: float
    beta1: float
    beta2: float
    weight_decay: float
    grad_clip_norm: float
    z_loss: float
    warmup_tokens: int
    decay_fraction: float
    periods: tuple[Period, ...]

    @property
    def total_tokens(self) -> int:
        return self.periods[-1].end

    @property
    def total_steps(self) -> int:
        return self.total_tokens // self.batch_tokens

    @property
    def checkpoints(self) -> tuple[RunCheckpointInfo, ...]:
        """The start, and the beginning and the end of each decay, by step; each step once.

        Where two fall on one step (a decay of the whole period begins where the last one ended) the end of a decay
        names it, else the start: those are the models that laws are fitted to.
        """
        found = {period.end // self.batch_tokens: f"{period.label} {POST_DECAY}" for period in self.periods}
        found.setdefault(0, "initialisation")
        for period in self.periods:
            found.setdefault(period.decay_start // self.batch_tokens, f"{period.label} pre-decay")
        return tuple(RunCheckpointInfo(step, found[step]) for step in sorted(found))


class RunConfigurator(Protocol):
    """A rule from a parameter count to the numbers of a run."""

    def target_batch_tokens(self, n_params: int) -> int: ...

    def numbers(self, n_params: int, batch_tokens: int) -> RunNumbers: ...


@dataclass(frozen=True)
class WSDSChinchillaRunConfigurator:
    """WSD-S (arXiv:2410.05192) whose periods end at 0.5, 1, 2, … times the tokens of Chinchilla, as in OLMo-core.

    One run gives a finished model at each multiple; `chinchilla_multiple` is the last one.
    """

    chinchilla_multiple: float = 4.0
    decay_fraction: float = 0.1
    lr_multiplier: float = 1.0
    fixed_lr: float = 0.0
    """Above 0: the peak learning rate of every size, for a parametrization that carries it over sizes."""
    batch_multiplier: float = 1.0
    weight_decay: float = 0.1
    grad_clip_norm: float = 1.0
    z_loss: float = 1e-5
    beta1: float = 0.9

    def __post_init__(self) -> None:
        for name in ("chinchilla_multiple", "decay_fraction", "lr_multiplier", "batch_multiplier", "grad_clip_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"run.{name} {getattr(self, name)} in the ladder file must be above 0.")
        for name in ("weight_decay", "z_loss", "fixed_lr"):
            if getattr(self, name) < 0:
                raise ConfigError(f"run.{name} {getattr(self, name)} in the ladder file must not be negative.")
        if self.decay_fraction > 1:
            raise ConfigError(f"run.decay_fraction {self.decay_fraction} in the ladder file is a share: at most 1.")
        if not 0 <= self.beta1 < 1:
            raise ConfigError(f"run.beta1 {self.beta1} in the ladder file is not in [0, 1).")

    def multiples(self) -> tuple[float, ...]:
        """Ends of the periods, in multiples of Chinchilla: each twice the one before, the last as requested."""
        ends, multiple = [], 0.5
        while multiple < self.chinchilla_multiple:
            ends.append(multiple)
            multiple *= 2
        return (*ends, self.chinchilla_multiple)

    def target_batch_tokens(self, n_params: int) -> int:
        """The batch in tokens before devices round it (arXiv:2402.00838: it grows as N^(2/3))."""
        return round(REFERENCE_BATCH * self.batch_multiplier * (n_params / REFERENCE_PARAMS) ** (2 / 3))

    def peak_lr(self, n_params: int) -> float:
        if self.fixed_lr:
            return self.fixed_lr * self.lr_multiplier
        return REFERENCE_LR * (n_params / REFERENCE_PARAMS) ** (-1 / 3) / 2 * self.lr_multiplier

    def numbers(self, n_params: int, batch_tokens: int) -> RunNumbers:
        """The numbers of a run of `n_params` parameters in batches of `batch_tokens`."""
        return RunNumbers(
            batch_tokens=batch_tokens,
            peak_lr=self.peak_lr(n_params),
            beta1=self.beta1,
            beta2=0.95 if batch_tokens >= HIGH_BETA2_BELOW else 0.99,
            weight_decay=self.weight_decay,
            grad_clip_norm=self.grad_clip_norm,
            z_loss=self.z_loss,
            warmup_tokens=n_params,
            decay_fraction=self.decay_fraction,
            periods=self._periods(n_params, batch_tokens),
        )

    def _periods(self, n_params: int, batch_tokens: int) -> tuple[Period, ...]:
        """Each end in whole batches.

        Raises:
            ConfigError: a period has no step, or the warm-up reaches into the first decay.
        """
        periods: list[Period] = []
        for multiple in self.multiples():
            start = periods[-1].end if periods else 0
            end = round(CHINCHILLA * n_params * multiple / batch_tokens) * batch_tokens
            if end <= start:
                raise ConfigError(
                    f"period {len(periods) + 1} of WSD-S, up to {multiple:g}×C of {n_params:,} parameters, has no step "
                    f"of {batch_tokens:,} tokens. Lower run.batch_multiplier in the ladder file, or use larger models."
                )
            decay = round(self.decay_fraction * (end - start))
            periods.append(Period(len(periods) + 1, multiple, start, end - decay, end))
        constant = periods[0].decay_start or periods[0].end  # a decay of the whole period begins after the warm-up
        if n_params > constant:
            raise ConfigError(
                f"run.chinchilla_multiple {self.chinchilla_multiple:g}, run.decay_fraction {self.decay_fraction:g} in "
                f"the ladder file: the warm-up of {n_params:,} tokens outlasts the {constant:,} before the first "
                "decay. Raise the multiple or lower the fraction."
            )
        return tuple(periods)


CONFIGURATORS: dict[str, type] = {"wsds-chinchilla": WSDSChinchillaRunConfigurator}
"""Rules by the name that `run.configurator` of the ladder file gives."""
