"""Models under evaluation: a checkpoint with its tokenizer and training facts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from open_lm import storage
from open_lm.checkpoint.load_model import load_model
from open_lm.checkpoint.read import read_facts
from open_lm.checkpoint.resolve import Found, resolve
from open_lm.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_near
from open_lm.distributed import World
from open_lm.errors import CheckpointError, ConfigError
from open_lm.evaluate.records import CheckpointRecords
from open_lm.evaluate.sharded_model import load_hf_sharded, load_sharded
from open_lm.model import create_model
from open_lm.model.config import ModelFlags, resolve_architecture


@dataclass(frozen=True)
class EvalModel:
    """A model on its device with its tokenizer; `seq_len` is its context, `n_embeddings` its vocabulary."""

    model: nn.Module
    tokenizer: Tokenizer
    seq_len: int
    n_embeddings: int
    about: CheckpointRecords


def load_eval_model(
    path: str,
    tokenizer: str | None,
    architecture: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype | None,
    shared_by: World | None = None,
) -> EvalModel:
    """The checkpoint at `path` (a run folder means its newest), ready to be evaluated; its weights spread over the
    ranks of `shared_by`, which must all call this.

    Raises:
        CheckpointError: there is none, it is of another architecture, or it names no tokenizer and none is given.
        ConfigError: the tokenizer has more tokens than the model has embeddings.
    """
    found = resolve(path)
    facts = read_facts(found)
    stored = (facts.get("config") or {}).get("tokenizer")
    if not (tokenizer or stored):
        raise CheckpointError(f"{path} does not name its tokenizer: give --tokenizer.")
    loaded = load_tokenizer(tokenizer or tokenizer_near(str(stored), found.path))
    about = CheckpointRecords(
        name=name_of(found),
        checkpoint=found.path,
        model=architecture.get("model") or "",
        tokenizer=loaded.name,
        step=_count(facts.get("step")),
        tokens=_count(facts.get("tokens")),
        weights=weights_identity(found),
    )
    if shared_by is None:
        model: Any = load_model(found, device=str(device), dtype=dtype, **architecture)
    else:
        model = load_sharded(found, shared_by, dtype, **architecture)
    about.model = about.model or f"{model.config.n_layers} layers, {model.config.hidden_dim} wide"
    require_same_vocabulary(loaded, model.config.vocab_size)
    return EvalModel(model, loaded, model.config.seq_len, model.config.vocab_size, about)


def load_hf_eval_model(
    flags: ModelFlags,
    tokenizer: str | None,
    device: torch.device,
    dtype: torch.dtype | None,
    shared_by: World | None = None,
) -> EvalModel:
    """The model of transformers that --hf-model names, with its own tokenizer unless another is given; spread over the
    ranks of `shared_by`, as above.

    Raises:
        ConfigError: it cannot be read, or its tokenizer has more tokens than it has embeddings.
    """
    config = resolve_architecture(flags)
    name = str(flags.hf_model)
    loaded = load_tokenizer(tokenizer or name)
    require_same_vocabulary(loaded, config.vocab_size)
    if shared_by is None:
        model = create_model(config).to(device, dtype).eval()
    else:
        model = load_hf_sharded(config, shared_by, dtype)
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


def name_of(found: Found) -> str:
    """The name of a checkpoint in tables: its run and epoch."""
    path = found.path.rstrip("/")
    epoch = os.path.basename(path).removesuffix(".pt").partition(".sharded-")[0]
    folder = storage.parent(path)
    if os.path.basename(folder.rstrip("/")) == "checkpoints":
        return f"{os.path.basename(storage.parent(folder).rstrip('/'))}/{epoch}"
    return epoch


def weights_identity(found: Found) -> str:
    """A text that changes when the weights do."""
    path = found.path
    if found.commit is not None:
        return f"{path} {found.commit.identity}"
    if storage.is_remote(path):
        return f"{path} {storage.size_bytes(path)}"
    local = storage.local_path(path).resolve()
    files = sorted(local.iterdir()) if local.is_dir() else [local]
    return " ".join([str(local), *(f"{f.stat().st_size} {f.stat().st_mtime_ns}" for f in files if f.is_file())])


def _count(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) else None
