"""Learning rate as a pure function of the step, so that a resumed run follows the same curve."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """A period without its warm-up: `step` of `n_steps` steps, the last `n_cooldown` of which may decay.

    Most schedules have one period, the run. Lengths that were given in tokens need not be whole steps.
    """

    step: float
    n_steps: float
    n_cooldown: float
    power: float

    @property
    def progress(self) -> float:
        """0 at the first step after warm-up, towards 1 at the end."""
        return self.step / (self.n_steps or 1)


def cosine(span: Span) -> float:
    """Half a cosine from 1 to 0 (Loshchilov & Hutter, 2017)."""
    return 0.5 * (1 + math.cos(math.pi * span.progress))


def const(span: Span) -> float:
    """Always 1."""
    return 1.0


def linear(span: Span) -> float:
    """A straight line from 1 to 0."""
    return 1 - span.progress


def const_cooldown(span: Span) -> float:
    """1, then `(1 - t) ** power` over the last `n_cooldown` steps."""
    into = span.step - (span.n_steps - span.n_cooldown)
    return 1.0 if into <= 0 else max(1 - into / (span.n_cooldown or 1), 0.0) ** span.power


SCHEDULES: dict[str, Callable[[Span], float]] = {
    "cosine": cosine,
    "const": const,
    "const-cooldown": const_cooldown,
    "linear": linear,
    "wsd": const_cooldown,
    "wsd-s": const_cooldown,
}
"""Shapes by name: each gives the share of the way from the end rate (0) to the peak (1).

WSD (warm-up, stable, decay; arXiv:2404.06395) is one long period. WSD-S (arXiv:2410.05192) is a row of them: each
decays at its end and leaves a finished model, and the next goes on from there at the peak rate.
"""


@dataclass(frozen=True)
class Schedule:
    """The learning rate of a run of `total_steps` steps; call it with a step counted from 0.

    Warm-up is linear: step s of W has `peak * (s + 1) / W`. `period_ends` are the steps at which the periods of WSD-S
    end, the last one with the run; `cooldown_fraction` is the share of each period that decays, where that is not said
    in steps. Lengths given in tokens are kept as fractions of a step. `at_end` reads the decay at the end of a step, so
    that the last step of a period has the rate `end` exactly.
    """

    shape: str
    peak: float
    end: float
    warmup_steps: float
    total_steps: int
    cooldown_steps: float = 0
    cooldown_power: float = 1.0
    cooldown_fraction: float = 0.0
    period_ends: tuple[int, ...] = ()
    floor: float = 0.0
    at_end: bool = False

    def __call__(self, step: int) -> float:
        if step + 1 <= self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        end = self.peak if self.shape == "const" else self.end
        return max(end + SCHEDULES[self.shape](self._span(step)) * (self.peak - end), self.floor)

    def _span(self, step: int) -> Span:
        """The period that `step` lies in, without its warm-up."""
        ends = self.period_ends or (self.total_steps,)
        index = min(bisect_right(ends, step), len(ends) - 1)
        start, end = (ends[index - 1] if index else 0), ends[index]
        n_cooldown = self.cooldown_steps or self.cooldown_fraction * (end - start)
        first = max(start, min(self.warmup_steps, end))
        position = max(step + self.at_end - first, 0)
        return Span(position, end - first, min(n_cooldown, end - first), self.cooldown_power)
