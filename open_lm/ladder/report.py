"""Report of a dry run: the plan of a size, line by line."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from open_lm import text
from open_lm.ladder.plan import SizePlan
from open_lm.ladder.sizes import COUNTINGS, count_params

ACTIVATION_BYTES = 34
"""Bytes a token, layer and unit of width, without attention scores (arXiv:2205.05198)."""
LOGIT_BYTES = 6
"""Bytes a logit: bf16 from the product, fp32 for the loss."""


def activation_bytes(plan: SizePlan) -> int:
    """Estimate of what one rank's micro-batch keeps for the backward pass, without activation checkpointing."""
    model, tokens = plan.size.architecture, plan.batch.rank_microbatch_tokens
    return tokens * (ACTIVATION_BYTES * model.hidden_dim * model.n_layers + LOGIT_BYTES * model.vocab_size)


def describe(plan: SizePlan, command: Sequence[str], tokens_per_second: float | None) -> str:
    """The plan of a size, line by line."""
    numbers, batch, config = plan.numbers, plan.batch, plan.config
    others = ", ".join(
        f"{count_params(plan.size.architecture, name):,} {name}" for name in COUNTINGS if name != config.counting
    )
    checkpoints = "".join(f"    step {i.step:>9,}  {i.description}\n" for i in numbers.checkpoints)
    flops = plan.model_size.flops_per_token * numbers.total_tokens
    lines = [
        f"size                {plan.name} of ladder {config.name}",
        f"model               {plan.size.architecture.hidden_dim} wide, {plan.size.architecture.n_layers} layers, "
        f"{plan.size.architecture.n_heads} heads",
        f"parameters N        {plan.n_params:,} {config.counting}: {COUNTINGS[config.counting]} ({others})",
        f"target batch        {batch.target_tokens:,} tokens",
        f"batch               {batch.tokens:,} tokens = {batch.tokens // config.sequence_length:,} sequences of "
        f"{config.sequence_length:,} ({batch.tokens / batch.target_tokens - 1:+.1%})",
        f"devices             {batch.devices} of {config.max_devices} ({batch.dp_world_size} data-parallel)",
        f"micro-batch         {batch.rank_microbatch_tokens:,} tokens a rank, accumulated {batch.accumulation} times",
        f"learning rate       {numbers.peak_lr:.6g} peak, warm-up over {numbers.warmup_tokens:,} tokens",
        f"optimizer           betas {numbers.beta1:g} {numbers.beta2:g}, weight decay {numbers.weight_decay:g} on all "
        f"but the embedding, clip {numbers.grad_clip_norm:g}, z-loss {numbers.z_loss:g}",
        f"length              {numbers.total_tokens:,} tokens in {plan.steps:,} steps "
        f"({numbers.periods[-1].multiple:g}×C, {len(numbers.periods)} periods)",
        f"checkpoints         {len(plan.checkpoint_steps)}, all kept\n{checkpoints.rstrip()}",
        f"memory              {text.size(plan.model_size.training_bytes)} for weights, gradients and optimizer over "
        f"all ranks, about {text.size(activation_bytes(plan))} of activations a rank",
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
