"""Construction of a run's evaluations: validation sets and downstream tasks."""

from __future__ import annotations

import logging
from functools import partial

import torch
from torch import Tensor

from open_lm.checkpoint.read import read_facts
from open_lm.data.loader import Loader, validation_batches
from open_lm.data.sources import Source, named_tokenizer, open_source
from open_lm.data.token_bytes import token_bytes
from open_lm.data.tokenizer import load_tokenizer, tokenizer_near
from open_lm.distributed import World
from open_lm.errors import ConfigError
from open_lm.evaluate.eval_model import require_same_vocabulary
from open_lm.evaluate.in_loop import InLoopEvaluator, prepare_suite
from open_lm.evaluate.validation import ValidationSet
from open_lm.model.config import ModelConfig
from open_lm.params import RunConfig
from open_lm.post_training.config import TASKS
from open_lm.run.build import refuse_doc_mask, tokenizer_name
from open_lm.train.run_length import global_batch_size
from open_lm.train.state import TrainState


def build_validation_sets(
    config: RunConfig, architecture: ModelConfig, world: World, loader: Loader | None
) -> list[ValidationSet]:
    """The sets of --val-data, opened, each readable any number of times.

    Raises:
        ConfigError: their batch does not divide, --tokenizer cannot be loaded or is not the model's, or a set or the
            task has no loss over tokens.
        DataError: a set is damaged.
        StorageError: it is not there.
    """
    refuse_doc_mask(config, architecture)
    flags, data = config.validation, config.data
    batch = validation_batch_size(config, world)
    limit = data.val_num_samples
    of_run = run_tokenizer(config, loader) if data.val_data else None
    sets = []
    for index, url in enumerate(data.val_data):
        key = data.val_data_key[index] if data.val_data_key else "auto"
        source = world.on_rank0(partial(open_source, url, key))
        _require_samples(config, source)
        named = data.tokenizer or named_tokenizer([source]) or of_run
        batches = partial(
            validation_batches,
            url,
            key=key,
            vocab_size=architecture.vocab_size,
            seq_len=architecture.seq_len,
            batch=batch // world.shape.n_shares,
            rank=world.share_rank,
            world_size=world.shape.n_shares,
            max_sequences=max(1, limit // architecture.seq_len) if limit else None,
            config=data,
        )
        bytes_of_V = _bytes_of_tokens(named, architecture.vocab_size, world, required=data.tokenizer is not None)
        sets.append(ValidationSet((flags.val_names or data.val_data)[index], url, batches, bytes_of_V))
    return sets


def _require_samples(config: RunConfig, source: Source) -> None:
    """Raise ConfigError where the loss over tokens of --val-data would mean nothing."""
    held_out = "Score held-out pairs with openlm evaluate --reward."
    if config.trains and TASKS.load(config.task.task).value_head == "alone":
        raise ConfigError(f"--val-data {source.name}: a reward model predicts no tokens. {held_out}")
    if any(shard.form != "samples" for shard in source.shards):
        raise ConfigError(f"--val-data {source.name} holds pairs, its loss is over tokens. {held_out}")


def validation_batch_size(config: RunConfig, world: World) -> int:
    """Sequences per validation batch over all ranks.

    Raises:
        ConfigError: they do not divide evenly among ranks.
    """
    flags, n_ranks = config.validation, world.shape.n_shares
    if flags.val_batch_size:
        batch = flags.val_batch_size * n_ranks
    elif flags.global_val_batch_size or not config.trains or world.shape.cp > 1:
        batch = flags.global_val_batch_size or n_ranks * -(-config.train.global_batch_size // n_ranks)
    else:
        batch = global_batch_size(config.train, world.shape.n_data)
    if batch % n_ranks:
        raise ConfigError(f"--global-val-batch-size {batch} does not divide among {n_ranks} ranks.")
    return batch


def build_tasks(
    config: RunConfig, architecture: ModelConfig, state: TrainState, loader: Loader | None
) -> InLoopEvaluator | None:
    """The tasks of --icl-tasks, every question read, checked and encoded; None where none are asked for.

    Raises:
        ConfigError: the tokenizer is not known or not the model's, the YAML is wrong, or a file is missing.
        DataError: a row is malformed or does not fit the context (file:line).
    """
    path = config.validation.icl_tasks
    if path is None:
        return None
    tokenizer = run_tokenizer(config, loader)
    if tokenizer is None:
        raise ConfigError("--icl-tasks needs to know the tokenizer that the data were made with: give --tokenizer.")
    prepared = state.world.on_rank0(lambda: prepare_suite(path, tokenizer, architecture.vocab_size))
    return InLoopEvaluator(
        prepared, state.model, state.world, seq_len=architecture.seq_len, precision=config.parallel.precision
    )


def run_tokenizer(config: RunConfig, loader: Loader | None) -> str | None:
    """The tokenizer of the run; where it only evaluates, that of the checkpoint, if it names one."""
    named = tokenizer_name(config, loader)
    flags = config.checkpoint
    path = flags.start[0] if flags.start else flags.resume
    if named or loader is not None or path in (None, "latest"):
        return named
    stored = (read_facts(str(path)).get("config") or {}).get("tokenizer")
    return tokenizer_near(stored, str(path)) if stored else None


def _bytes_of_tokens(name: str | None, vocab_size: int, world: World, *, required: bool) -> Tensor | None:
    """Bytes per id on this rank's device; None where the tokenizer is unknown or, unless `required`, not available."""
    if name is None:
        return None
    counts = world.on_rank0(lambda: _read_token_bytes(name, vocab_size, required=required))
    if counts is None:
        return None
    bytes_of_V = torch.zeros(vocab_size, dtype=torch.long)
    bytes_of_V[: len(counts)] = torch.tensor(counts)
    return bytes_of_V.to(world.device)


def _read_token_bytes(name: str, vocab_size: int, *, required: bool) -> list[int] | None:
    try:
        tokenizer = load_tokenizer(name, at_hand=not required)
        require_same_vocabulary(tokenizer, vocab_size)
    except ConfigError as error:
        if required:
            raise
        logging.info("no bits per byte: %s Give --tokenizer to have them.", error)
        return None
    counts = token_bytes(tokenizer)
    if counts is None:
        logging.warning("no bits per byte: the tokens of %s stand for no bytes of their own.", name)
    return counts
