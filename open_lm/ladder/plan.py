"""Plan of one size: parameters, batch, optimizer, length and checkpoints, and the command that trains exactly that."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from open_lm import storage
from open_lm.errors import ConfigError
from open_lm.ladder.batches import BATCH_TOLERANCE, BatchPlan, plan_batch
from open_lm.ladder.config import LadderConfig
from open_lm.ladder.run_configurator import RunNumbers
from open_lm.ladder.sizes import SIZE_TOLERANCE, SizeSpec, count_params, label_params
from open_lm.model.describe import ModelSize, model_size
from open_lm.train.schedule import Schedule

EPHEMERAL_SAVES = 20
"""Parts of a run after each of which its state is saved, so that a kill costs at most one of them."""


@dataclass(frozen=True)
class SizePlan:
    """A size of a ladder with all its numbers."""

    config: LadderConfig
    size: SizeSpec
    n_params: int
    model_size: ModelSize
    batch: BatchPlan
    numbers: RunNumbers

    @property
    def name(self) -> str:
        return self.size.name

    @property
    def steps(self) -> int:
        return self.numbers.total_steps

    @property
    def checkpoint_steps(self) -> tuple[int, ...]:
        """Steps of the checkpoints that are kept, 0 included, each once."""
        return tuple(sorted({info.step for info in self.numbers.checkpoints}))

    @property
    def schedule(self) -> Schedule:
        """The learning rate, as the trainer computes it from the flags of `train_flags`."""
        numbers = self.numbers
        return Schedule(
            "wsd-s",
            peak=numbers.peak_lr,
            end=0.0,
            warmup_steps=numbers.warmup_tokens / numbers.batch_tokens,
            total_steps=self.steps,
            cooldown_fraction=numbers.decay_fraction,
            period_ends=tuple(period.end // numbers.batch_tokens for period in numbers.periods),
            at_end=True,
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """Where the plan is farther from what was asked than a person expects."""
        found = []
        if self.batch.deviation > BATCH_TOLERANCE:
            found.append(
                f"batch of {self.batch.tokens:,} tokens is {self.batch.deviation:.1%} off its target "
                f"{self.batch.target_tokens:,}"
            )
        label = label_params(self.name)
        if label is not None and abs(self.n_params - label) / label > SIZE_TOLERANCE:
            off = abs(self.n_params - label) / label
            found.append(
                f"{self.n_params:,} parameters ({self.config.counting}) are {off:.1%} off the name {self.name}"
            )
        return tuple(found)

    def facts(self) -> dict[str, Any]:
        """All that decides what a run of this size computes: kept beside it, and compared before it is continued."""
        numbers = self.numbers
        return {
            "model": self.size.architecture.to_dict(),
            "counting": self.config.counting,
            "num_params": self.n_params,
            "sequence_length": self.config.sequence_length,
            "batch_tokens": numbers.batch_tokens,
            "peak_lr": numbers.peak_lr,
            "beta1": numbers.beta1,
            "beta2": numbers.beta2,
            "weight_decay": numbers.weight_decay,
            "grad_clip_norm": numbers.grad_clip_norm,
            "z_loss": numbers.z_loss,
            "warmup_tokens": numbers.warmup_tokens,
            "decay_fraction": numbers.decay_fraction,
            "period_tokens": [period.tokens for period in numbers.periods],
            "seed": self.config.seed,
            "data": list(self.config.data.manifests),
            "data_weights": list(self.config.data.weights),
            "val_data": list(self.config.val_data),
            "tokenizer": self.config.tokenizer,
            "icl_tasks": self.config.icl_tasks,
            "flags": dict(self.config.flags),
        }


def plan_size(config: LadderConfig, name: str) -> SizePlan:
    """The plan of size `name`.

    Raises:
        ConfigError: the ladder has no such size, or its numbers leave no run.
    """
    spec, rule = config.size(name), config.configurator()
    n_params = count_params(spec.architecture, config.counting)
    target = rule.target_batch_tokens(n_params)
    batch = plan_batch(target, spec.rank_microbatch_tokens, spec.mesh, config.max_devices, config.sequence_length)
    numbers = rule.numbers(n_params, batch.tokens)
    return SizePlan(config, spec, n_params, model_size(spec.architecture), batch, numbers)


def train_flags(plan: SizePlan, model_path: str, logs: str, name: str, **own: Any) -> dict[str, Any]:
    """Flags of `open_lm.main` for the run of `plan`; `own` replaces or adds some, None takes one away."""
    numbers, batch, config = plan.numbers, plan.batch, plan.config
    steps = ",".join(map(str, plan.checkpoint_steps))
    flags: dict[str, Any] = {
        "model": model_path,
        "dataset_manifest": [config.path(name) for name in config.data.manifests],
        "train_data_mix_weights": list(config.data.weights) or None,
        "tokenizer": _tokenizer(config),
        "global_batch_size": batch.tokens // config.sequence_length,
        "accum_freq": batch.accumulation,
        "train_tokens": numbers.total_tokens,
        "num_checkpoints": 1,
        "lr": numbers.peak_lr,
        "warmup_tokens": numbers.warmup_tokens,
        "lr_scheduler": "wsd-s",
        "lr_read_at": "end",
        "lr_decay_fraction": numbers.decay_fraction,
        "lr_period_tokens": [period.tokens for period in numbers.periods],
        "lr_cooldown_end": 0.0,
        "beta1": numbers.beta1,
        "beta2": numbers.beta2,
        "wd": numbers.weight_decay,
        "wd_rule": "all-but-embedding",
        "grad_clip_norm": numbers.grad_clip_norm,
        "z_loss_coefficient": numbers.z_loss,
        "seed": config.seed,
        "val_data": [config.path(name) for name in config.val_data] or None,
        "icl_tasks": config.path(config.icl_tasks) if config.icl_tasks else None,
        "icl_frequency": 0 if config.icl_tasks else None,
        "eval_at_steps": steps if config.val_data or config.icl_tasks else None,
        "save_at_steps": steps,
        "ephemeral_every_steps": max(1, plan.steps // EPHEMERAL_SAVES),
        "log_every_n_steps": max(1, min(100, plan.steps // 50)),
        "device": "cpu" if config.device_type.lower() == "cpu" else None,
        "wandb_project_name": config.project,
        "logs_dir": logs,
        "name": name,
        "resume": "latest",
        "remote_sync": config.root if storage.is_remote(config.root) else None,
    }
    given = {key.replace("-", "_"): value for key, value in config.flags.items()}
    return flags | given | own


def as_argv(flags: Mapping[str, Any]) -> list[str]:
    """Flags as a command line; None leaves one out, true and false become --flag and --no-flag.

    Raises:
        ConfigError: a value is no text, number, truth value or list of those.
    """
    argv: list[str] = []
    for name, value in flags.items():
        spelled = "--" + name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            argv.append(spelled if value else f"--no-{spelled[2:]}")
        elif isinstance(value, list | tuple):
            argv += [spelled, *map(_word, value)]
        elif isinstance(value, str | int | float):
            argv += [spelled, _word(value)]
        else:
            raise ConfigError(f"flags.{name} in the ladder file: found {value!r}, need text, a number, true or a list.")
    return argv


def command_of(plan: SizePlan, argv: list[str]) -> list[str]:
    """The command that starts the trainer on the devices of the plan."""
    if plan.batch.devices == 1:
        return [sys.executable, "-m", "open_lm.main", *argv]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={plan.batch.devices}", "-m", "open_lm.main", *argv]


def _word(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def _tokenizer(config: LadderConfig) -> str | None:
    """A tokenizer file beside the ladder file by its path, a name of the Hub as it is."""
    name = config.tokenizer
    if name is None:
        return None
    return config.path(name) if storage.exists(config.path(name)) else name
