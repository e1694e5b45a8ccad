"""Dry run: model size, memory and steps of a run, without touching data, device or folder."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from open_lm import text
from open_lm.checkpoint.save_policy import SaveSteps
from open_lm.distributed import ranks_from_environment
from open_lm.mesh import MeshShape
from open_lm.model.config import ModelConfig
from open_lm.model.describe import ModelSize, model_size
from open_lm.params import RunConfig
from open_lm.run.build import architecture_of
from open_lm.run.check_mesh import check_mesh
from open_lm.run.mesh_costs import costs_of_run
from open_lm.train.config import mesh_shape
from open_lm.train.run_length import RunLength, build_schedule, global_batch_size, run_length_of
from open_lm.train.schedule import Schedule


@dataclass(frozen=True)
class Forecast:
    """A run as it would go."""

    config: RunConfig
    architecture: ModelConfig
    size: ModelSize
    run_length: RunLength
    lr_at: Schedule
    world_size: int
    shape: MeshShape

    def __str__(self) -> str:
        steps, size = self.run_length, self.size
        ends = [end + d for end in self.lr_at.period_ends[:4] for d in (-1, 0)]
        marks = sorted({0, math.ceil(self.lr_at.warmup_steps), steps.total_steps // 2, *ends, steps.total_steps - 1})
        rates = ", ".join(f"step {s}: {self.lr_at(s):.3g}" for s in marks if s < steps.total_steps)
        flops = size.flops_per_token * steps.total_tokens
        flags = "".join(f"  {name}: {json.dumps(value)}\n" for name, value in self.config.as_flags().items())
        return (
            f"flags\n{flags}"
            f"model         {json.dumps(self.architecture.to_dict())}\n"
            f"parameters    {size.parameters:,} ({size.non_embedding_parameters:,} without embeddings)\n"
            f"memory        {text.size(size.training_bytes)} for weights, gradients and optimizer over all ranks, "
            "activations come on top\n"
            f"compute       {text.count(size.flops_per_token)} FLOPs a token, {text.count(flops)} in all\n"
            f"ranks         {self.world_size} ({self.shape})\n"
            f"{self._costs}"
            f"steps         {steps.total_steps:,} of {steps.tokens_per_step:,} tokens: {steps.total_tokens:,} tokens\n"
            f"{self._stop}"
            f"checkpoints   after steps {', '.join(map(str, self._save_steps.all()))}\n"
            f"learning rate {rates}"
        )

    @property
    def _costs(self) -> str:
        """Memory and traffic of one rank; for the transformers of --model only."""
        if not isinstance(self.architecture, ModelConfig):
            return ""
        sequences = self.run_length.tokens_per_step // self.architecture.seq_len // self.shape.n_data
        accum = self.config.train.accum_freq
        costs = costs_of_run(self.config, self.architecture, self.shape, sequences=sequences, accum=accum)
        return f"{costs}\n"

    @property
    def _save_steps(self) -> SaveSteps:
        return SaveSteps(self.config.checkpoint, self.run_length.interval_ends, self.run_length.last_step)

    @property
    def _stop(self) -> str:
        steps = self.run_length
        if steps.last_step == steps.total_steps:
            return ""
        return f"stops         after step {steps.last_step:,}: {steps.last_step * steps.tokens_per_step:,} tokens\n"


def forecast(config: RunConfig) -> Forecast:
    """The parameters, memory, steps and tokens that `config` asks for.

    Raises:
        ConfigError: the length is not known without the data, or the batch does not divide.
    """
    architecture = architecture_of(config)
    world_size = config.parallel.preset_world_size or ranks_from_environment()[1]
    shape = mesh_shape(config.parallel, world_size)
    check_mesh(config, architecture, shape)
    tokens_per_step = global_batch_size(config.train, shape.n_data) * architecture.seq_len
    run_length = run_length_of(config.train, tokens_per_step, None, architecture.seq_len)
    lr_at = build_schedule(config.schedule, run_length)
    return Forecast(config, architecture, model_size(architecture), run_length, lr_at, world_size, shape)
