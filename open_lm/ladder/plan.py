"""Plan of one size: parameters, batch, optimizer, length, learning rate and checkpoints."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

from open_lm.ladder.batches import BATCH_TOLERANCE, BatchPlan, plan_batch
from open_lm.ladder.config import LadderConfig
from open_lm.ladder.run_configurator import Period, RunNumbers
from open_lm.ladder.sizes import SIZE_TOLERANCE, SizeSpec, count_params, label_params
from open_lm.model.describe import ModelSize, model_size
from open_lm.train.schedule import Schedule


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

    def decay_steps(self, period: Period) -> int:
        """Optimizer steps of a period's decay, at least one."""
        return max(1, (period.end - period.decay_start) // self.numbers.batch_tokens)

    def loss_steps(self, step: int) -> int:
        """Steps before a checkpoint that its training loss is the mean of: the last tenth of a decay.

        Before, the loss still falls with the learning rate.
        """
        ends = [period.end // self.numbers.batch_tokens for period in self.numbers.periods]
        period = self.numbers.periods[min(bisect_left(ends, step), len(ends) - 1)]
        return max(1, self.decay_steps(period) // 10)

    @property
    def schedule(self) -> Schedule:
        """The learning rate, as the trainer computes it from its flags."""
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
        """Deviations of the plan from the request that are larger than a person expects."""
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
        if self.config.project and not self.config.reports_to_wandb:
            found.append(
                f'project {self.config.project} is used by Weights & Biases only: give flags.report_to "wandb"'
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
