"""Checks of --mesh against the model and the task, before anything is built."""

from __future__ import annotations

from dataclasses import replace

import torch

from open_lm.errors import ConfigError
from open_lm.mesh import MeshShape
from open_lm.model import create_model
from open_lm.model.config import ModelConfig
from open_lm.params import RunConfig
from open_lm.post_training.config import TASKS
from open_lm.train.expert_parallel import require_experts
from open_lm.train.tensor_parallel import require_parts

PER_TOKEN_TASKS = ("pretrain", "sft")
"""Tasks whose loss is a sum over tokens, each by itself."""


def check_mesh(config: RunConfig, architecture: ModelConfig, shape: MeshShape) -> None:
    """Raise ConfigError where the model, its sequences or the task do not divide as `shape` asks."""
    if not shape.is_plain or config.parallel.fsdp:
        _refuse_shares(config, shape)
    tp, cp = shape.tp, shape.cp
    if shape.ep > 1:
        require_experts(_experts(architecture), shape.ep)
    if tp == cp == 1:
        return
    if not isinstance(architecture, ModelConfig):
        raise ConfigError(f"--mesh {shape}: only the transformers of --model divide by tp and cp. Use fsdp for others.")
    _check_lengths(architecture, shape)
    if tp > 1:
        with torch.device("meta"):
            require_parts(create_model(replace(architecture, n_layers=max(1, architecture.moe_freq))), tp)
    task, flags = config.task.task, config.distillation
    if task not in PER_TOKEN_TASKS or flags.distill_pretrained:
        what = "--distill-pretrained" if flags.distill_pretrained else f"--task {task}"
        raise ConfigError(f"--mesh {shape}: {what} needs whole sequences and logits on each rank. Use dp and fsdp.")
    if config.task.neftune_alpha:
        raise ConfigError(f"--mesh {shape}: --neftune-alpha draws noise for whole sequences. Use dp and fsdp.")
    if tp > 1 and (config.adapters.lora_rank is not None or config.adapters.lora_from is not None):
        raise ConfigError(f"--mesh {shape}: adapters (--lora-rank, --lora-from) do not divide by tp. Use dp and fsdp.")
    if cp > 1 and architecture.attn_seq_scalar not in (None, "none"):
        raise ConfigError(
            f"--mesh {shape}: --attn-seq-scalar {architecture.attn_seq_scalar} scales by the length. Leave out cp."
        )


def _experts(architecture: ModelConfig) -> list[int]:
    """The numbers of experts of each layer that has any."""
    if not isinstance(architecture, ModelConfig):
        return []
    n_experts = architecture.moe_num_experts or 0
    return [n_experts for layer in range(architecture.n_layers) if architecture.has_experts(layer)]


def _refuse_shares(config: RunConfig, shape: MeshShape) -> None:
    """Raise ConfigError where the task, the optimizer or the adapters need the whole model on each rank."""
    asked = "--fsdp" if config.parallel.fsdp and not config.parallel.mesh else f"--mesh {shape}"
    if TASKS.load(config.task.task).form == "prompts":
        raise ConfigError(
            f"--task {config.task.task} writes answers on every rank by itself: leave out {asked}. Ranks share the "
            "prompts without it."
        )
    if config.optimizer.optimizer == "adafactor":
        raise ConfigError(
            f"--optimizer adafactor: torch's works on whole matrices; leave out {asked}, or take another."
        )
    if config.adapters.lora_base == "nf4":
        raise ConfigError(f"--lora-base nf4: each rank holds all of its bits; leave out {asked}.")


def _check_lengths(architecture: ModelConfig, shape: MeshShape) -> None:
    seq_len, tp, cp = architecture.seq_len, shape.tp, shape.cp
    if seq_len % (2 * cp if cp > 1 else 1) or (seq_len // cp) % tp:
        pieces = f"{2 * cp} pieces" if cp > 1 else f"{tp} parts"
        raise ConfigError(
            f"--mesh {shape}: sequences of {seq_len} do not divide into {pieces}"
            f"{f' of a multiple of {tp}' if cp > 1 and tp > 1 else ''}. Choose another seq_len."
        )
    if architecture.vocab_size % tp:
        nearest = -(-architecture.vocab_size // tp) * tp
        raise ConfigError(
            f"--mesh {shape}: a vocabulary of {architecture.vocab_size} does not divide into {tp} parts. "
            f"Make vocab_size {nearest}: ids that no text has cost nothing."
        )
