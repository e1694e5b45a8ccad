"""Run length from the flags: batch size, steps, checkpoint intervals, and the learning rate of each step."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from open_lm.errors import ConfigError
from open_lm.train.config import ScheduleConfig, TrainConfig
from open_lm.train.schedule import Schedule


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


def global_batch_size(train: TrainConfig, world_size: int) -> int:
    """Sequences per optimizer step over all ranks.

    Raises:
        ConfigError: they do not divide evenly among ranks and micro-batches.
    """
    if train.batch_size is not None:
        n_sequences, spelled = train.batch_size * world_size, f"--batch-size {train.batch_size} on {world_size} ranks"
    else:
        n_sequences, spelled = train.global_batch_size, f"--global-batch-size {train.global_batch_size}"
    share = world_size * train.accum_freq
    if n_sequences % share:
        nearest = max(share, round(n_sequences / share) * share)
        raise ConfigError(
            f"{spelled} does not divide among {world_size} ranks x --accum-freq {train.accum_freq} micro-batches. "
            f"The nearest batch that does is {nearest}."
        )
    return n_sequences


def run_length_of(train: TrainConfig, tokens_per_step: int, n_sequences: int | None, seq_len: int) -> RunLength:
    """The steps of the run: --train-tokens (or -steps) and --num-checkpoints, or --train-num-samples and --epochs."""
    n_intervals = train.num_checkpoints or 1
    if train.train_steps is not None:
        train_tokens = train.train_steps * tokens_per_step
    elif train.train_tokens is not None:
        train_tokens = train.train_tokens
    else:
        train_tokens, n_intervals = _interval_tokens(train, n_sequences, seq_len) * train.epochs, train.epochs
    stop_at = train.stop_at_step
    if train.stop_at_tokens is not None:
        stop_at = -(-train.stop_at_tokens // tokens_per_step)
    return replace(even_intervals(train_tokens, n_intervals, tokens_per_step), stop_at=stop_at)


def _interval_tokens(train: TrainConfig, n_sequences: int | None, seq_len: int) -> int:
    if train.train_num_samples is not None:
        return train.train_num_samples
    if n_sequences is None:
        raise ConfigError(
            "how much data there is is not known without a manifest: give --train-tokens, or make one with "
            "`openlm manifest --data-dir DIR`."
        )
    return n_sequences * seq_len


def even_intervals(train_tokens: int, n_intervals: int, tokens_per_step: int) -> RunLength:
    """Cut `train_tokens` into `n_intervals` equal intervals, each end rounded down to whole steps on its own.

    Rounding the ends, not the lengths, keeps every interval end within one batch of the tokens asked for.

    Raises:
        ConfigError: an interval is shorter than one step.
    """
    ends = tuple(train_tokens * k // (n_intervals * tokens_per_step) for k in range(1, n_intervals + 1))
    if any(end == start for start, end in zip((0, *ends), ends, strict=False)):
        raise ConfigError(
            f"{train_tokens} tokens in {n_intervals} checkpoint intervals leave an interval without a step: "
            f"a step takes {tokens_per_step} tokens. Raise --train-tokens (or "
            "--train-num-samples), or lower --global-batch-size or the number of intervals."
        )
    return RunLength(ends, tokens_per_step)


def build_schedule(config: ScheduleConfig, run_length: RunLength) -> Schedule:
    """The learning rate of every step.

    Raises:
        ConfigError: the periods of wsd-s are longer than the run.
    """

    def n_steps(tokens: int) -> float:
        return tokens / max(run_length.tokens_per_step, 1)

    warmup = config.warmup if config.warmup_tokens is None else n_steps(config.warmup_tokens)
    if warmup >= run_length.total_steps and not config.skip_scheduler:
        logging.warning(
            "a warm-up of %g steps: the run has %d, so --lr is never reached.", warmup, run_length.total_steps
        )
    decays_apart = config.lr_scheduler in ("wsd", "wsd-s")
    cooldown = (
        n_steps(config.lr_decay_tokens or 0) if decays_apart else run_length.cooldown_steps(config.epochs_cooldown)
    )
    return Schedule(
        shape="const" if config.skip_scheduler else config.lr_scheduler,
        peak=config.lr,
        end=config.lr_cooldown_end,
        warmup_steps=0 if config.skip_scheduler else warmup,
        total_steps=run_length.total_steps,
        cooldown_steps=cooldown,
        cooldown_power=config.lr_cooldown_power,
        cooldown_fraction=config.lr_decay_fraction if decays_apart else 0.0,
        period_ends=period_ends(config, run_length) if config.lr_scheduler == "wsd-s" else (),
        floor=config.force_min_lr,
        at_end=config.lr_read_at == "end",
    )


def period_ends(config: ScheduleConfig, run_length: RunLength) -> tuple[int, ...]:
    """The steps at which the periods of wsd-s end; the last period takes what is left."""
    if not config.lr_period_tokens:
        return run_length.interval_ends
    ends = [round(tokens / run_length.tokens_per_step) for tokens in accumulate(config.lr_period_tokens)]
    if ends[-1] > run_length.total_steps or any(end <= start for start, end in pairwise([0, *ends])):
        raise ConfigError(
            f"--lr-period-tokens end after {ends} steps: they must grow and stay within the run's "
            f"{run_length.total_steps}."
        )
    return (*ends[:-1], run_length.total_steps)
