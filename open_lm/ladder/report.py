"""Report of a dry run: the plan of a size, line by line."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from open_lm import text
from open_lm.ladder.plan import SizePlan
from open_lm.ladder.sizes import COUNTINGS, count_params
from open_lm.model.architecture import ModelConfig
from open_lm.params import RunConfig
from open_lm.train.config import mesh_shape


def _memory(plan: SizePlan, config: RunConfig) -> str:
    """Peak memory of one rank, by the arithmetic of the trainer's own dry run."""
    model, parallel = plan.size.architecture, config.parallel
    if not isinstance(model, ModelConfig):
        return f"{text.size(plan.model_size.training_bytes)} for weights, gradients and optimizer; activations on top"
    from open_lm.run.mesh_costs import costs_of_run

    shape = mesh_shape(parallel, plan.batch.devices)
    sequences = plan.batch.tokens // plan.config.sequence_length // shape.n_data
    costs = costs_of_run(config, model, shape, sequences=sequences, accum=plan.batch.accumulation)
    where = f"sharded over {shape.n_shards * shape.tp} ranks" if shape.n_shards * shape.tp > 1 else "whole on each"
    return (
        f"about {text.size(costs.held)} a rank: {text.size(costs.state)} of weights, gradients and optimizer "
        f"({where}), {text.size(costs.gathered)} of gathered weights, {text.size(costs.activations)} of activations"
    )


def describe(plan: SizePlan, config: RunConfig, command: Sequence[str], tokens_per_second: float | None) -> str:
    """The plan of a size, line by line; `config` is what the trainer reads from `command`."""
    numbers, batch, ladder = plan.numbers, plan.batch, plan.config
    others = ", ".join(
        f"{count_params(plan.size.architecture, name):,} {name}" for name in COUNTINGS if name != ladder.counting
    )
    checkpoints = "".join(f"    step {i.step:>9,}  {i.description}\n" for i in numbers.checkpoints)
    flops = plan.model_size.flops_per_token * numbers.total_tokens
    lines = [
        f"size                {plan.name} of ladder {ladder.name}",
        f"model               {plan.size.architecture.hidden_dim} wide, {plan.size.architecture.n_layers} layers, "
        f"{plan.size.architecture.n_heads} heads",
        f"parameters N        {plan.n_params:,} {ladder.counting}: {COUNTINGS[ladder.counting]} ({others})",
        f"target batch        {batch.target_tokens:,} tokens",
        f"batch               {batch.tokens:,} tokens = {batch.tokens // ladder.sequence_length:,} sequences of "
        f"{ladder.sequence_length:,} ({batch.tokens / batch.target_tokens - 1:+.1%})",
        f"devices             {batch.devices} of {ladder.max_devices} ({batch.dp_world_size} data-parallel)",
        f"micro-batch         {batch.rank_microbatch_tokens:,} tokens a rank, accumulated {batch.accumulation} times",
        f"learning rate       {numbers.peak_lr:.6g} peak, warm-up over {numbers.warmup_tokens:,} tokens",
        f"optimizer           betas {numbers.beta1:g} {numbers.beta2:g}, weight decay {numbers.weight_decay:g} on all "
        f"but the embedding, clip {numbers.grad_clip_norm:g}, z-loss {numbers.z_loss:g}",
        f"length              {numbers.total_tokens:,} tokens in {plan.steps:,} steps "
        f"({numbers.periods[-1].multiple:g}×C, {len(numbers.periods)} periods)",
        f"checkpoints         {len(plan.checkpoint_steps)}, all kept\n{checkpoints.rstrip()}",
        f"memory              {_memory(plan, config)}",
        f"compute             {flops:.3g} FLOPs",
        f"time                {_hours(numbers.total_tokens, tokens_per_second)}",
        f"command             {shlex.join(command)}",
        *(f"WARNING             {warning}" for warning in plan.warnings),
    ]
    return "\n".join(lines)


def _hours(tokens: int, speed: float | None) -> str:
    if speed is None:
        return "unknown: give --tokens-per-second, or measure it with run-benchmark"
    return f"{tokens / speed / 3600:.2f} hours at {speed:,.0f} tokens/s"
