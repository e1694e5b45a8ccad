"""Run length: the number of steps and the steps at which checkpoint intervals end."""

from __future__ import annotations

from dataclasses import dataclass

from open_lm.errors import ConfigError


@dataclass(frozen=True)
class RunLength:
    """The steps of a run: `interval_ends[k - 1]` steps have been taken when interval k ends.

    `stop_at` leaves the run after that many steps, with the learning rates of the whole one.
    """

    interval_ends: tuple[int, ...]
    tokens_per_step: int
    stop_at: int | None = None

    @property
    def total_steps(self) -> int:
        return self.interval_ends[-1]

    @property
    def last_step(self) -> int:
        """The steps that are taken before the program ends: all, or up to where it was asked to stop."""
        return min(self.total_steps, self.stop_at or self.total_steps)

    @property
    def total_tokens(self) -> int:
        return self.total_steps * self.tokens_per_step

    def intervals_done(self, step: int) -> int:
        """Number of intervals that have ended after `step` steps."""
        return sum(end <= step for end in self.interval_ends)

    def cooldown_steps(self, n_intervals: int | None) -> int:
        """The steps of the last `n_intervals` intervals."""
        if not n_intervals:
            return 0
        before = len(self.interval_ends) - n_intervals
        return self.total_steps - (self.interval_ends[before - 1] if before > 0 else 0)


def run_length(total_tokens: int, n_intervals: int, tokens_per_step: int) -> RunLength:
    """Cut `total_tokens` into `n_intervals` equal intervals, each end rounded down to whole steps on its own.

    Rounding the ends, not the lengths, keeps every interval end within one batch of the tokens asked for.

    Raises:
        ConfigError: an interval is shorter than one step.
    """
    ends = tuple(total_tokens * k // (n_intervals * tokens_per_step) for k in range(1, n_intervals + 1))
    if any(end == start for start, end in zip((0, *ends), ends, strict=False)):
        raise ConfigError(
            f"{total_tokens} tokens in {n_intervals} checkpoint intervals leave an interval without a step: "
            f"a step takes {tokens_per_step} tokens. Raise --train-tokens (or "
            "--train-num-samples), or lower --global-batch-size or the number of intervals."
        )
    return RunLength(ends, tokens_per_step)
