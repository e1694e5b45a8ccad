"""How the parts of a run are made from its configuration: the data, then the state that trains on them."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise

import torch

from open_lm.checkpoint.commit import committed
from open_lm.checkpoint.contents import stored_config
from open_lm.data.loader import Loader, build_loader, validation_batches
from open_lm.data.sources import named_tokenizer
from open_lm.distributed import World
from open_lm.errors import ConfigError
from open_lm.evaluate.held_out import ValidationSet
from open_lm.evaluate.icl.in_training import TasksInTraining, read_exam
from open_lm.model import create_model
from open_lm.model.config import ModelConfig, resolve
from open_lm.params import RunConfig
from open_lm.precision import Precision
from open_lm.run_folder import run_folder
from open_lm.train.config import ScheduleConfig, TrainConfig
from open_lm.train.horizon import Horizon, horizon
from open_lm.train.optim import build_optimizers
from open_lm.train.parallel import wrap
from open_lm.train.schedule import Schedule
from open_lm.train.state import TrainState
from open_lm.train.tasks import NextToken


def architecture_of(config: RunConfig) -> ModelConfig:
    """The architecture of --model and its flags; without --model that of the checkpoint the run starts from.

    Raises:
        ConfigError: no such model.
        CheckpointError: the checkpoint is missing or holds no architecture.
    """
    path = config.checkpoint.pretrained or config.checkpoint.resume
    if config.model.model is not None or path is None:
        return resolve(config.model)
    if path != "latest":
        return ModelConfig.from_dict(stored_config(path)["model"])
    commits = committed(os.path.join(run_folder(config), "checkpoints"))
    return ModelConfig.from_dict(commits[0].facts["config"]["model"]) if commits else resolve(config.model)


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


def build_loader_and_horizon(
    config: RunConfig, architecture: ModelConfig, world: World
) -> tuple[Loader | None, Horizon]:
    """The data, opened and checked to be enough, and the steps to take over them; none of both to evaluate only."""
    if not config.trains:
        return None, Horizon((0,), tokens_per_step=0)
    batch = global_batch_size(config, world.size)
    refuse_doc_mask(config, architecture)
    loader = build_loader(
        config.data,
        vocab_size=architecture.vocab_size,
        seq_len=architecture.seq_len,
        global_batch=batch,
        rank=world.rank,
        world_size=world.size,
        seed=config.train.seed,
    )
    steps = run_horizon(config, batch * architecture.seq_len, loader.n_sequences, architecture.seq_len)
    loader.require(steps.last_step)
    return loader, steps


def refuse_doc_mask(config: RunConfig, architecture: ModelConfig) -> None:
    """Raise ConfigError where --doc-mask is asked of a model that cannot keep documents apart."""
    if config.data.doc_mask and not isinstance(architecture, ModelConfig):
        kind = {"MambaConfig": "a Mamba", "HFConfig": "--hf-model"}.get(type(architecture).__name__, "this model")
        raise ConfigError(f"--doc-mask: not with {kind}; only the transformers of --model keep documents apart.")


def tokenizer_name(config: RunConfig, loader: Loader | None) -> str | None:
    """The tokenizer of the run: --tokenizer, or the one that the manifests of its training data name, or None."""
    return config.data.tokenizer or (named_tokenizer(loader.sources) if loader is not None else None)


def run_horizon(config: RunConfig, tokens_per_step: int, n_sequences: int | None, seq_len: int) -> Horizon:
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
    return replace(horizon(tokens, n_intervals, tokens_per_step), stop_at=stop_at)


def _interval_tokens(train: TrainConfig, n_sequences: int | None, seq_len: int) -> int:
    if train.train_num_samples is not None:
        return train.train_num_samples
    if n_sequences is None:
        raise ConfigError(
            "how much data there is is not known without a manifest: give --train-tokens, or make one with "
            "`python -m open_lm.utils.make_wds_manifest --data-dir DIR`."
        )
    return n_sequences * seq_len


def build_schedule(config: ScheduleConfig, steps: Horizon) -> Schedule:
    """The learning rate of every step.

    Raises:
        ConfigError: the periods of wsd-s are longer than the run.
    """

    def n_steps(tokens: int) -> int:
        return round(tokens / max(steps.tokens_per_step, 1))

    warmup = config.warmup if config.warmup_tokens is None else n_steps(config.warmup_tokens)
    if warmup >= steps.total_steps and not config.skip_scheduler:
        logging.warning("a warm-up of %d steps: the run has %d, so --lr is never reached.", warmup, steps.total_steps)
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
    )


def period_ends(config: ScheduleConfig, steps: Horizon) -> tuple[int, ...]:
    """The steps at which the periods of wsd-s end; the last period takes what is left."""
    if not config.lr_period_tokens:
        return steps.interval_ends
    ends = [round(tokens / steps.tokens_per_step) for tokens in accumulate(config.lr_period_tokens)]
    if ends[-1] > steps.total_steps or any(end <= start for start, end in pairwise([0, *ends])):
        raise ConfigError(
            f"--lr-period-tokens end after {ends} steps: they must grow and stay within the run's {steps.total_steps}."
        )
    return (*ends[:-1], steps.total_steps)


def build_state(config: RunConfig, architecture: ModelConfig, world: World, steps: Horizon) -> TrainState:
    """The model with the weights of --seed, wrapped for the ranks, and what trains it."""
    parallel = config.parallel
    precision = Precision(parallel.precision, world.device.type)
    torch.manual_seed(config.train.seed)
    model = create_model(architecture).to(world.device, precision.weight_dtype)
    wrapped = wrap(model, world, parallel)
    balance = architecture.moe_loss_weight if any(map(architecture.has_experts, range(architecture.n_layers))) else None
    return TrainState(
        model=wrapped,
        optimizers=build_optimizers(wrapped, config.optimizer, config.schedule.lr),
        precision=precision,
        lr_at=build_schedule(config.schedule, steps),
        horizon=steps,
        task=NextToken(config.train.z_loss_coefficient, balance),
        world=world,
    )


def build_tasks(
    config: RunConfig, architecture: ModelConfig, state: TrainState, loader: Loader | None
) -> TasksInTraining | None:
    """The tasks of --icl-tasks, every question read, checked and encoded; None where none are asked for.

    Raises:
        ConfigError: the tokenizer is not known or not the model's, the YAML is wrong, or a file is missing.
        DataError: a row is malformed or does not fit the context (file:line).
    """
    path = config.validation.icl_tasks
    if path is None:
        return None
    tokenizer = tokenizer_name(config, loader)
    if tokenizer is None:
        raise ConfigError("--icl-tasks needs to know the tokenizer that the data were made with: give --tokenizer.")
    exam = state.world.from_master(lambda: read_exam(path, tokenizer, architecture.vocab_size))
    return TasksInTraining(
        exam, state.model, state.world, seq_len=architecture.seq_len, precision=config.parallel.precision
    )


def build_validation_sets(config: RunConfig, architecture: ModelConfig, world: World) -> list[ValidationSet]:
    """The sets of --val-data, each readable any number of times."""
    flags = config.validation
    refuse_doc_mask(config, architecture)
    if flags.val_batch_size:
        batch = flags.val_batch_size * world.size
    elif flags.global_val_batch_size or not config.trains:
        batch = flags.global_val_batch_size or world.size * -(-config.train.global_batch_size // world.size)
    else:
        batch = global_batch_size(config, world.size)
    if batch % world.size:
        raise ConfigError(f"--global-val-batch-size {batch} does not divide among {world.size} ranks.")
    limit = config.data.val_num_samples

    return [
        ValidationSet(
            name=(flags.val_names or config.data.val_data)[index],
            url=url,
            batches=partial(
                validation_batches,
                url,
                key=config.data.val_data_key[index] if config.data.val_data_key else "auto",
                vocab_size=architecture.vocab_size,
                seq_len=architecture.seq_len,
                batch=batch // world.size,
                rank=world.rank,
                world_size=world.size,
                max_sequences=max(1, limit // architecture.seq_len) if limit else None,
                config=config.data,
            ),
        )
        for index, url in enumerate(config.data.val_data)
    ]
