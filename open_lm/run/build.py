"""Construction of a run's parts from its configuration: the loader, then the training state."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from open_lm.checkpoint.load_model import load_model
from open_lm.checkpoint.read import architecture_named, stored_config
from open_lm.data.columns import Column, column_beside
from open_lm.data.loader import Loader, build_loader
from open_lm.data.sources import Source, named_tokenizer
from open_lm.distributed import World
from open_lm.errors import ConfigError, StorageError
from open_lm.model.config import ModelConfig, resolve_architecture
from open_lm.model.lora import adapt, hold_in_nf4
from open_lm.params import RunConfig
from open_lm.post_training.chat.prepare import MARGINS
from open_lm.post_training.config import TASKS
from open_lm.post_training.peft_format import load_adapter
from open_lm.post_training.prompts import Prompts, ledger_beside
from open_lm.post_training.reference import COLUMN, read_log_probs, reference_path, start_weights
from open_lm.post_training.reward_model import MARGIN, add_value_head
from open_lm.post_training.tasks import TaskKind, TaskParts
from open_lm.precision import Precision
from open_lm.run.check_mesh import check_mesh
from open_lm.run.folder import newest_commit
from open_lm.run.rollout_setup import build_prompts
from open_lm.train.averagers import parse_averagers
from open_lm.train.averaging import WeightAverage
from open_lm.train.backends import prepare_backends
from open_lm.train.context_parallel import sequence_part
from open_lm.train.init_model import build_wrapped
from open_lm.train.optim import build_optimizers
from open_lm.train.random_state import seed_rank
from open_lm.train.run_length import RunLength, build_schedule, global_batch_size, run_length_of
from open_lm.train.spike_guard import SpikeGuard
from open_lm.train.state import TrainState
from open_lm.train.tasks import Distillation, NextToken, Task


def architecture_of(config: RunConfig) -> ModelConfig:
    """The architecture of --model and its flags; without --model that of the checkpoint the run starts from.

    Raises:
        ConfigError: no such model.
        CheckpointError: the checkpoint is missing or holds no architecture.
    """
    flags = config.checkpoint
    path = flags.start[0] if flags.start else flags.resume
    if config.model.model is not None or path is None:
        return architecture_named(config.model)
    if path != "latest":
        return ModelConfig.from_dict(stored_config(path)["model"])
    newest = newest_commit(config)
    return ModelConfig.from_dict(newest.facts["config"]["model"]) if newest else resolve_architecture(config.model)


def build_loader_and_length(
    config: RunConfig, architecture: ModelConfig, world: World
) -> tuple[Loader | Prompts | None, RunLength]:
    """The data, opened and checked to be enough, and the run's length; (None, empty) when only evaluating."""
    if not config.trains:
        return None, RunLength((0,), tokens_per_step=0)
    kind: TaskKind = TASKS.load(config.task.task)
    check_mesh(config, architecture, world.shape)
    if kind.form == "prompts":
        return build_prompts(config, architecture, world)
    global_batch = global_batch_size(config.train, world.shape.n_data)
    refuse_doc_mask(config, architecture)
    loader = build_loader(
        config.data,
        vocab_size=architecture.vocab_size,
        seq_len=architecture.seq_len,
        form=kind.form,
        rows=kind.rows,
        global_batch=global_batch,
        rank=world.data_rank,
        world_size=world.shape.n_data,
        seed=config.train.seed,
        on_rank0=world.on_rank0,
    )
    sample_len = kind.rows * architecture.seq_len
    add_columns(config, architecture, loader, world)
    run_length = run_length_of(config.train, global_batch * sample_len, loader.n_sequences, sample_len)
    loader.require(run_length.last_step)
    refuse_packed(loader, architecture)
    return loader, run_length


def refuse_doc_mask(config: RunConfig, architecture: ModelConfig) -> None:
    """Raise ConfigError where --doc-mask is asked of a model that cannot keep documents apart."""
    kind = architecture.kind
    if config.data.doc_mask and not architecture.keeps_documents_apart:
        raise ConfigError(f"--doc-mask: not with {kind}; only the transformers of --model keep documents apart.")


def add_columns(config: RunConfig, architecture: ModelConfig, loader: Loader, world: World) -> None:
    """Let the loader give what stands beside its pairs: margins, and log-probabilities under the reference.

    Raises:
        CheckpointError: --reference-log-probs was computed with other weights.
        ConfigError: it was computed of other data.
    """
    margins = column_beside(loader.sources, MARGINS) if config.task.task == "reward" else None
    if margins is not None:
        loader.columns[MARGIN] = margins
    url, start = config.preferences.reference_log_probs, reference_path(config)
    if url is not None:
        if start is None:
            raise ConfigError("--reference-log-probs belongs to weights: name those that the run starts from.")
        read = partial(_checked_log_probs, url, loader.sources, start, architecture.seq_len)
        world.on_rank0(lambda: read() and None)
        loader.columns[COLUMN] = read_log_probs(url, loader.sources, None, architecture.seq_len)


def _checked_log_probs(url: str, sources: list[Source], start: str, seq_len: int) -> Column:
    return read_log_probs(url, sources, start_weights(start), seq_len)


def refuse_packed(loader: Loader, architecture: ModelConfig) -> None:
    """Raise ConfigError where packed conversations are given to a model that cannot keep them apart."""
    packed = any(shard.packed for source in loader.sources for shard in source.shards)
    if packed and not architecture.keeps_documents_apart:
        raise ConfigError(
            "the data hold several conversations in one sequence, which only the transformers of --model keep apart. "
            "Make them with --no-packing."
        )


def tokenizer_name(config: RunConfig, loader: Loader | Prompts | None) -> str | None:
    """The tokenizer of the run: --tokenizer, or the one that its prompts or the manifests of its data name, or None."""
    if config.data.tokenizer or loader is None:
        return config.data.tokenizer
    return loader.ledger.get("tokenizer") if isinstance(loader, Prompts) else named_tokenizer(loader.sources)


def chat_template_of(config: RunConfig, loader: Loader | Prompts | None, world: World) -> str | None:
    """The source of the template that the chat data of the run were made with; None where ledgers name none, or two."""
    if loader is None or config.task.task == "pretrain":
        return None
    if isinstance(loader, Prompts):
        return loader.ledger.get("chat_template")
    manifests = config.data.dataset_manifest or ()
    found = world.on_rank0(lambda: set(map(_template_beside, manifests))) - {None}
    return found.pop() if len(found) == 1 else None


def _template_beside(manifest: str) -> str | None:
    try:
        return ledger_beside(manifest).get("chat_template")
    except StorageError:  # a bucket that forbids to ask for what is not there
        return None


def build_task(
    config: RunConfig, architecture: ModelConfig, world: World, precision: Precision, model: nn.Module
) -> Task:
    """The objective of --task over `model`.

    Raises:
        ConfigError: the teacher of --distill-pretrained has another vocabulary, or the task cannot train this model.
        CheckpointError: a further model that it needs is missing or damaged, or states no architecture.
    """
    has_experts = any(map(architecture.has_experts, range(architecture.n_layers)))
    next_token = NextToken(
        config.train.z_loss_coefficient,
        architecture.moe_loss_weight if has_experts else None,
        config.tracking.log_logit_mean,
        architecture.moe_num_experts or 0 if has_experts else 0,
    )
    objective = next_token if config.distillation.distill_pretrained is None else distillation(
        config, architecture, world, precision, next_token
    )  # fmt: skip
    kind: TaskKind = TASKS.load(config.task.task)
    return kind.build(TaskParts(config, model, objective, world, precision))


def distillation(
    config: RunConfig, architecture: ModelConfig, world: World, precision: Precision, next_token: NextToken
) -> Distillation:
    """The objective with the teacher of --distill-pretrained."""
    flags = config.distillation
    assert flags.distill_pretrained is not None
    teacher = load_model(
        flags.distill_pretrained, model=flags.distill_model, device=str(world.device), dtype=precision.weight_dtype
    )
    if teacher.config.vocab_size != architecture.vocab_size:
        raise ConfigError(
            f"--distill-pretrained {flags.distill_pretrained} has {teacher.config.vocab_size} tokens, the model "
            f"{architecture.vocab_size}: teacher and student need the same tokenizer."
        )
    return Distillation(teacher.requires_grad_(False), flags.distill_weight, flags.distill_temperature, next_token)


def additions(config: RunConfig, architecture: ModelConfig) -> Callable[[nn.Module], None] | None:
    """A function that adds the adapters and the value head of task and flags to a model; None where there are none."""
    flags, kind = config.adapters, TASKS.load(config.task.task)
    if flags.lora_base == "nf4" and config.checkpoint.checkpoint_format == "sharded":
        raise ConfigError("--lora-base nf4: each rank holds all of its bits; leave out --checkpoint-format sharded.")
    if flags.lora_from is None and flags.lora_rank is None and not kind.value_head:
        return None

    def add(model: nn.Module) -> None:
        if flags.lora_from is not None:
            load_adapter(model, architecture, flags.lora_from)
        elif flags.lora_rank is not None:
            options: dict[str, Any] = {"targets": flags.lora_targets, "dropout": flags.lora_dropout}
            adapt(model, flags.lora_rank, flags.scale, with_magnitude=flags.dora, **options)
        if flags.lora_base == "nf4":
            hold_in_nf4(model)
        if kind.value_head:
            add_value_head(model, alone=kind.value_head == "alone")

    return add


def build_state(config: RunConfig, architecture: ModelConfig, world: World, run_length: RunLength) -> TrainState:
    """The model with the weights of --seed, wrapped for the ranks, and what trains it."""
    parallel = config.parallel
    if parallel.preset_world_size not in (None, world.size):
        logging.warning(
            "--preset-world-size %d: the launcher started %d ranks, which the run uses.",
            parallel.preset_world_size, world.size,
        )  # fmt: skip
    prepare_backends(parallel, world.device, architecture.seq_len, architecture.vocab_size)
    precision = Precision(parallel.precision, world.device.type)
    wrapped = build_wrapped(
        architecture, world, parallel, config.train.seed, precision.weight_dtype, additions(config, architecture)
    )
    seed_rank(config.train.seed, world.share_rank)
    averages = [WeightAverage(spec, wrapped) for spec in parse_averagers(config.optimizer.averagers)]
    sigma = config.optimizer.skip_step_sigma
    return TrainState(
        model=wrapped,
        optimizers=build_optimizers(wrapped, config.optimizer, config.schedule.lr, architecture),
        precision=precision,
        lr_at=build_schedule(config.schedule, run_length),
        run_length=run_length,
        task=build_task(config, architecture, world, precision, wrapped),
        world=world,
        part=sequence_part(world),
        averages=averages,
        guard=SpikeGuard(sigma) if sigma else None,
    )
