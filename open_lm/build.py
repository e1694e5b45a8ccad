"""How the parts of a run are made from its configuration: the data, then the state that trains on them."""

from __future__ import annotations

import logging
import os
from functools import partial

import torch

from open_lm.checkpoint.commit import committed
from open_lm.checkpoint.contents import stored_config
from open_lm.data.loader import Loader, build_loader, validation_batches
from open_lm.data.sources import named_tokenizer
from open_lm.distributed import World
from open_lm.errors import ConfigError
from open_lm.evaluate.held_out import ValidationSet
from open_lm.model import create_model
from open_lm.model.config import ModelConfig, resolve
from open_lm.params import RunConfig
from open_lm.precision import Precision
from open_lm.run_folder import run_folder
from open_lm.train.config import ScheduleConfig
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
    loader.require(steps.total_steps)
    return loader, steps


def tokenizer_name(config: RunConfig, loader: Loader | None) -> str | None:
    """The tokenizer of the run: --tokenizer, or the one that the manifests of its training data name, or None."""
    return config.data.tokenizer or (named_tokenizer(loader.sources) if loader is not None else None)


def run_horizon(config: RunConfig, tokens_per_step: int, n_sequences: int | None, seq_len: int) -> Horizon:
    """The steps of the run, from --train-tokens and --num-checkpoints or --train-num-samples and --epochs."""
    train = config.train
    if train.train_tokens is not None:
        return horizon(train.train_tokens, train.num_checkpoints or 1, tokens_per_step)
    tokens = train.train_num_samples
    if tokens is None:
        if n_sequences is None:
            raise ConfigError(
                "how much data there is is not known without a manifest: give --train-tokens, or make one with "
                "`python -m open_lm.utils.make_wds_manifest --data-dir DIR`."
            )
        tokens = n_sequences * seq_len
    return horizon(tokens * train.epochs, train.epochs, tokens_per_step)


def build_schedule(config: ScheduleConfig, steps: Horizon) -> Schedule:
    """The learning rate of every step."""
    if config.warmup >= steps.total_steps and not config.skip_scheduler:
        logging.warning(
            "--warmup %d: the run has only %d steps, so --lr is never reached.", config.warmup, steps.total_steps
        )
    return Schedule(
        shape="const" if config.skip_scheduler else config.lr_scheduler,
        peak=config.lr,
        end=config.lr_cooldown_end,
        warmup_steps=0 if config.skip_scheduler else config.warmup,
        total_steps=steps.total_steps,
        cooldown_steps=steps.cooldown_steps(config.epochs_cooldown),
        cooldown_power=config.lr_cooldown_power,
        floor=config.force_min_lr,
    )


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


def build_validation_sets(config: RunConfig, architecture: ModelConfig, world: World) -> list[ValidationSet]:
    """The sets of --val-data, each readable any number of times."""
    flags = config.validation
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
            ),
        )
        for index, url in enumerate(config.data.val_data)
    ]
