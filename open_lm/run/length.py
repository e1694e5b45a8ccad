"""Length of a run from its flags: batch size, steps, intervals, and the learning rate of each step."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import accumulate, pairwise

from open_lm.errors import ConfigError
from open_lm.params import RunConfig
from open_lm.train.config import ScheduleConfig, TrainConfig
from open_lm.train.run_length import RunLength, run_length
from open_lm.train.schedule import Schedule


def global_batch_size(config: RunConfig, world_size: int) -> int:
    """Sequences per optimizer step over all ranks.

    Raises:
        ConfigError: they do not divide evenly among ranks and micro-batches.
    """
    train = config.train
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


def run_length_of(config: RunConfig, tokens_per_step: int, n_sequences: int | None, seq_len: int) -> RunLength:
    """The steps of the run: --train-tokens (or -steps) and --num-checkpoints, or --train-num-samples and --epochs."""
    train = config.train
    n_intervals = train.num_checkpoints or 1
    if train.train_steps is not None:
        tokens = train.train_steps * tokens_per_step
    elif train.train_tokens is not None:
        tokens = train.train_tokens
    else:
        tokens, n_intervals = _interval_tokens(train, n_sequences, seq_len) * train.epochs, train.epochs
    stop_at = train.stop_at_step
    if train.stop_at_tokens is not None:
        stop_at = -(-train.stop_at_tokens // tokens_per_step)
    return replace(run_length(tokens, n_intervals, tokens_per_step), stop_at=stop_at)


def _interval_tokens(train: TrainConfig, n_sequences: int | None, seq_len: int) -> int:
    if train.train_num_samples is not None:
        return train.train_num_samples
    if n_sequences is None:
        raise ConfigError(
            "how much data there is is not known without a manifest: give --train-tokens, or make one with "
            "`openlm manifest --data-dir DIR`."
        )
    return n_sequences * seq_len


def build_schedule(config: ScheduleConfig, steps: RunLength) -> Schedule:
    """The learning rate of every step.

    Raises:
        ConfigError: the periods of wsd-s are longer than the run.
    """

    def n_steps(tokens: int) -> float:
        return tokens / max(steps.tokens_per_step, 1)

    warmup = config.warmup if config.warmup_tokens is None else n_steps(config.warmup_tokens)
    if warmup >= steps.total_steps and not config.skip_scheduler:
        logging.warning("a warm-up of %g steps: the run has %d, so --lr is never reached.", warmup, steps.total_steps)
    decays_apart = config.lr_scheduler in ("wsd", "wsd-s")
    cooldown = n_steps(config.lr_decay_tokens or 0) if decays_apart else steps.cooldown_steps(config.epochs_cooldown)
    return Schedule(
        shape="const" if config.skip_scheduler else config.lr_scheduler,
        peak=config.lr,
        end=config.lr_cooldown_end,
        warmup_steps=0 if config.skip_scheduler else warmup,
        total_steps=steps.total_steps,
        cooldown_steps=cooldown,
        cooldown_power=config.lr_cooldown_power,
        cooldown_fraction=config.lr_decay_fraction if decays_apart else 0.0,
        period_ends=period_ends(config, steps) if config.lr_scheduler == "wsd-s" else (),
        floor=config.force_min_lr,
        at_end=config.lr_read_at == "end",
    )


def period_ends(config: ScheduleConfig, steps: RunLength) -> tuple[int, ...]:
    """The steps at which the periods of wsd-s end; the last period takes what is left."""
    if not config.lr_period_tokens:
        return steps.interval_ends
    ends = [round(tokens / steps.tokens_per_step) for tokens in accumulate(config.lr_period_tokens)]
    if ends[-1] > steps.total_steps or any(end <= start for start, end in pairwise([0, *ends])):
        raise ConfigError(
            f"--lr-period-tokens end after {ends} steps: they must grow and stay within the run's {steps.total_steps}."
        )
    return (*ends[:-1], steps.total_steps)
