"""Averaging schedules: the share the newest weights get, a pure function of how many have been added."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from open_lm.errors import ConfigError


def ema(n: int, decay: float) -> float:
    """Exponential: the average starts at the first weights and keeps `decay` of itself each time."""
    return 1 - decay


def poly(n: int, eta: float) -> float:
    """Polynomial decay (Shamir & Zhang, arXiv:1212.1824): older weights count less by a power of their age; 0 is the
    plain mean."""
    return (eta + 1) / (n + eta)


def cosine(n: int, period: float) -> float:
    """Weighted by half a sine over `period` weights, then again: it ends where a cosine schedule would lead
    (Sandler et al., arXiv:2301.02312)."""
    i = (n - 1) % period + 1
    weight_i = math.sin(math.pi * (i - 0.5) / period)
    sum_to_i = (1 - math.cos(math.pi * i / period)) / (2 * math.sin(math.pi / (2 * period)))
    return min(weight_i / sum_to_i, 1.0)


AVERAGERS: dict[str, Callable[[int, float], float]] = {"ema": ema, "poly": poly, "cosine": cosine}
"""Methods by name: each gives the share of the n-th weights, n counted from 1, and the parameter of --averagers."""


@dataclass(frozen=True)
class AveragerSpec:
    """One average as `--averagers` names it: `ema_0.999_1` is the method, its parameter, and every how many steps."""

    name: str
    method: str
    parameter: float
    every_n_steps: int

    def share(self, n: int) -> float:
        """The share of the n-th weights added (n from 1)."""
        return AVERAGERS[self.method](n, self.parameter)


def parse_averagers(text: str | None) -> tuple[AveragerSpec, ...]:
    """The averages that `--averagers` names, separated by commas.

    Raises:
        ConfigError: one of them is not METHOD_PARAMETER_STEPS, or its parameter is out of range.
    """
    specs = tuple(_parse_one(name.strip(), text) for name in (text or "").split(",") if name.strip())
    if len({spec.name for spec in specs}) < len(specs):
        raise ConfigError(f"--averagers {text}: one is named twice.")
    return specs


def _parse_one(name: str, text: str | None) -> AveragerSpec:
    method, *numbers = name.split("_")
    try:
        parameter, every = float(numbers[0]), int(numbers[1])
        if len(numbers) != 2 or method not in AVERAGERS:
            raise ValueError
    except (ValueError, IndexError):
        raise ConfigError(
            f"--averagers {text}: {name!r} is not METHOD_PARAMETER_STEPS with a method of {', '.join(AVERAGERS)}, "
            "such as ema_0.999_1."
        ) from None
    fits = {"ema": 0 <= parameter < 1, "poly": parameter >= 0, "cosine": parameter >= 1 and parameter.is_integer()}
    if not fits[method] or every < 1:
        raise ConfigError(
            f"--averagers {text}: {name!r} is out of range: ema takes a decay in [0, 1), poly an exponent of at least "
            "0, cosine a whole number of averaged weights; all of them at least 1 step."
        )
    return AveragerSpec(name, method, parameter, every)
