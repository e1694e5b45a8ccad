"""Checkpoints read whole, whatever their format: weights, facts, and the architecture they state."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.checkpoint.commit import commit_beside, copy, hashed
from open_lm.checkpoint.resolve import is_transformers_folder, local_source, weights_file
from open_lm.checkpoint.sharded import INDEX, STATS, is_sharded, read_tensors
from open_lm.checkpoint.tree import SEPARATOR
from open_lm.errors import CheckpointError
from open_lm.model.config import ModelConfig, ModelFlags, resolve
from open_lm.weights.file import load_file
from open_lm.weights.hf_folder import from_transformers
from open_lm.weights.hub import is_hub


def read_checkpoint(path: str) -> dict[str, Any]:
    """The content of a checkpoint as a dict of ours, whatever `path` names: at least `state_dict`, or bare weights.

    A folder of transformers (its names and its config become ours) and hf://owner/name[@revision] are taken too.

    Raises:
        CheckpointError: there is none, it is damaged, or holds what our architectures do not.
        StorageError: it cannot be downloaded.
    """
    source = local_source(path)
    if not is_transformers_folder(source) and is_sharded(file := weights_file(source)):
        return read_sharded(file)
    if not is_transformers_folder(source):
        return load_file(weights_file(source))
    folder = storage.local_path(source)
    config, weights = from_transformers(folder)
    known: dict[str, Any] = {"tokenizer": str(folder.resolve())} if (folder / "tokenizer.json").is_file() else {}
    if config:
        known["model"] = config.to_dict()
    return {"state_dict": weights, **({"config": known} if known else {})}


def read_sharded(path: str) -> dict[str, Any]:
    """The whole weights and the facts of the sharded checkpoint at `path`, as if it were an epoch_K.pt.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    with local_shards(path) as folder:
        stats = load_file(str(folder / STATS))
        weights = read_tensors(folder, f"weights{SEPARATOR}")
    facts = {name: stats[name] for name in ("epoch", "name", "step", "tokens", "evaluation_metrics", "config")}
    return {**facts, "state_dict": weights}


@contextlib.contextmanager
def local_shards(path: str) -> Iterator[Path]:
    """The folder of a sharded checkpoint on this machine: itself, or while the block runs a copy of a remote one.

    Raises:
        CheckpointError: there is none, or its index and facts are not what was written, before any of it is read.
    """
    commit = commit_beside(path)
    if commit is None or not storage.exists(path):
        raise CheckpointError(f"{path}: no complete checkpoint: the folder or its commit file is missing.")
    name = path.rstrip("/").rpartition("/")[2]
    mine = {file: record for file, record in commit.files.items() if file.startswith(f"{name}/")}
    with contextlib.ExitStack() as stack:
        folder = storage.local_path(path)
        if storage.is_remote(path):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / name
            for file in mine:
                copy(storage.join(storage.parent(path), file), str(folder.parent / file))
        for file in (f"{name}/{STATS}", f"{name}/{INDEX}"):
            if not (folder.parent / file).is_file() or hashed(str(folder.parent / file)) != mine.get(file):
                raise CheckpointError(f"{path}: {file} is not what was written. Use another checkpoint.")
        yield folder


def stored_config(path: str) -> dict[str, Any]:
    """What a checkpoint of ours knows of its run: `model` (the architecture) and `flags`.

    Raises:
        CheckpointError: it is missing, or was made by a program that keeps no architecture in it.
    """
    config = read_checkpoint(path).get("config")
    if not config or not config.get("model"):
        raise CheckpointError(f"{path} does not say which model it is of: give --model and its flags.")
    return config


def architecture_named(flags: ModelFlags) -> ModelConfig:
    """The architecture that the flags name; hf://owner/name and folders of transformers state all of it themselves.

    Raises:
        ConfigError: no such model, or a key out of range.
        CheckpointError: the repository or folder says nothing of an architecture, or one that we cannot express.
        StorageError: it cannot be downloaded.
    """
    name = flags.model
    if name is None or not (is_hub(name) or is_transformers_folder(name)):
        return resolve(flags)
    return ModelConfig.from_dict(stored_config(name)["model"], f"--model {name}")
