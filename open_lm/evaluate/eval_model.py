"""Models under evaluation: a checkpoint with its tokenizer and training facts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from open_lm import storage
from open_lm.checkpoint.load_model import load_model, weights_file
from open_lm.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_near
from open_lm.errors import CheckpointError, ConfigError
from open_lm.evaluate.records import CheckpointRecords
from open_lm.model import create_model
from open_lm.model.config import ModelFlags, resolve
from open_lm.weights.file import load_file


@dataclass(frozen=True)
class EvalModel:
    """A model on its device with its tokenizer; `seq_len` is its context, `n_embeddings` its vocabulary."""

    model: nn.Module
    tokenizer: Tokenizer
    seq_len: int
    n_embeddings: int
    about: CheckpointRecords


def load_eval_model(
    path: str, tokenizer: str | None, architecture: dict[str, Any], device: torch.device, dtype: torch.dtype | None
) -> EvalModel:
    """The checkpoint at `path` (a run folder means its newest), ready to be evaluated.

    Raises:
        CheckpointError: there is none, it is of another architecture, or it names no tokenizer and none is given.
        ConfigError: the tokenizer has more tokens than the model has embeddings.
    """
    file = weights_file(path)
    content = load_file(file)
    stored = (content.get("config") or {}).get("tokenizer")
    if not (tokenizer or stored):
        raise CheckpointError(f"{path} does not name its tokenizer: give --tokenizer.")
    loaded = load_tokenizer(tokenizer or tokenizer_near(str(stored), file))
    about = CheckpointRecords(
        name=name_of(path, file),
        checkpoint=file,
        model=architecture.get("model") or "",
        tokenizer=loaded.name,
        step=_count(content.get("step")),
        tokens=_count(content.get("tokens")),
        weights=weights_identity(file),
    )
    del content
    model = load_model(path, device=str(device), dtype=dtype, **architecture)
    about.model = about.model or f"{model.config.n_layers} layers, {model.config.hidden_dim} wide"
    require_same_vocabulary(loaded, model.config.vocab_size)
    return EvalModel(model, loaded, model.config.seq_len, model.config.vocab_size, about)


def load_hf_eval_model(
    flags: ModelFlags, tokenizer: str | None, device: torch.device, dtype: torch.dtype | None
) -> EvalModel:
    """The model of transformers that --hf-model names, with its own tokenizer unless another is given.

    Raises:
        ConfigError: it cannot be read, or its tokenizer has more tokens than it has embeddings.
    """
    config = resolve(flags)
    name = str(flags.hf_model)
    loaded = load_tokenizer(tokenizer or name)
    require_same_vocabulary(loaded, config.vocab_size)
    model = create_model(config).to(device, dtype).eval()
    about = CheckpointRecords(
        name=os.path.basename(name.rstrip("/")), checkpoint=name, model=name, tokenizer=loaded.name
    )
    about.weights = name
    return EvalModel(model, loaded, config.seq_len, config.vocab_size, about)


def require_same_vocabulary(tokenizer: Tokenizer, n_embeddings: int) -> None:
    """Raise when the tokenizer has ids that the model has no embedding for.

    Raises:
        ConfigError: it has.
    """
    if tokenizer.vocab_size > n_embeddings:
        raise ConfigError(
            f"--tokenizer {tokenizer.name}: {tokenizer.vocab_size} tokens, the model has {n_embeddings} "
            "embeddings. Give the tokenizer it was trained with."
        )


def name_of(path: str, file: str) -> str:
    """What tables call a checkpoint: its run and epoch."""
    epoch = os.path.basename(file).removesuffix(".pt")
    folder = storage.parent(file)
    if os.path.basename(folder.rstrip("/")) == "checkpoints":
        return f"{os.path.basename(storage.parent(folder).rstrip('/'))}/{epoch}"
    return epoch


def weights_identity(file: str) -> str:
    """A text that changes when the file does."""
    if storage.is_remote(file):
        return f"{file} {storage.size_bytes(file)}"
    stats = storage.local_path(file).stat()
    return f"{storage.local_path(file).resolve()} {stats.st_size} {stats.st_mtime_ns}"


def _count(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) else None
