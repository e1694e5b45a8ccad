"""Checkpoints read whole, whatever their format: weights, facts, and the architecture they state."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.checkpoint.checksum import matches
from open_lm.checkpoint.commit import commit_beside, copy
from open_lm.checkpoint.resolve import Found, Name, is_hub, is_transformers_folder, resolve
from open_lm.checkpoint.sharded import INDEX, STATS, read_tensors
from open_lm.checkpoint.tree import SEPARATOR
from open_lm.errors import CheckpointError
from open_lm.model.config import ModelConfig, ModelFlags, resolve_architecture
from open_lm.weights.file import load_file
from open_lm.weights.hf_folder import from_transformers

FACTS = ("epoch", "name", "step", "tokens", "evaluation_metrics", "config")


def read_checkpoint(name: Name) -> dict[str, Any]:
    """The content of a checkpoint as a dict of ours, whatever `name` names: at least `state_dict`, or bare weights.

    The checksums of its weights are compared with its commit file, once. A folder of transformers (its names and its
    config become ours) and hf://owner/name[@revision] are taken too.

    Raises:
        CheckpointError: there is none, it is damaged, or holds what our architectures do not.
        StorageError: it cannot be downloaded.
    """
    return read_found(resolve(name, "weights"))


def read_found(found: Found) -> dict[str, Any]:
    """As `read_checkpoint`, of what its name was resolved to; its checksums are compared where that was asked for then.

    Raises:
        CheckpointError: it is damaged, or holds what our architectures do not.
    """
    if found.kind == "shards":
        return read_sharded(found)
    if found.kind == "file":
        return load_file(found.path)
    folder = storage.local_path(found.path)
    config, weights = from_transformers(folder)
    known: dict[str, Any] = {"tokenizer": str(folder.resolve())} if (folder / "tokenizer.json").is_file() else {}
    if config:
        known["model"] = config.to_dict()
    return {"state_dict": weights, **({"config": known} if known else {})}


def read_facts(name: Name) -> dict[str, Any]:
    """The metadata of a checkpoint: `step`, `tokens`, `config`, metrics; {} if it has none.

    Weights are neither read nor hashed; of one with a commit file that says all of it not even opened.

    Raises:
        CheckpointError, StorageError: as `read_checkpoint`.
    """
    found = resolve(name)
    if found.commit is not None and "tokens" in found.commit.facts:
        stated = found.commit.facts
        return {"epoch": found.commit.epoch, "step": found.commit.step} | {k: stated[k] for k in FACTS if k in stated}
    if found.kind == "shards":
        with local_shards(found, only_facts=True) as folder:
            return {name: value for name, value in load_file(str(folder / STATS)).items() if name in FACTS}
    content = load_file(found.path) if found.kind == "file" else read_checkpoint(found)
    return {name: value for name, value in content.items() if name != "state_dict"} if "state_dict" in content else {}


def read_sharded(found: Found) -> dict[str, Any]:
    """The whole weights and the facts of a sharded checkpoint, as if it were an epoch_K.pt.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    with local_shards(found) as folder:
        stats = load_file(str(folder / STATS))
        weights = read_tensors(folder, f"weights{SEPARATOR}")
    return {**{name: stats[name] for name in FACTS}, "state_dict": weights}


@contextlib.contextmanager
def local_shards(found: Found, *, only_facts: bool = False) -> Iterator[Path]:
    """The folder of a sharded checkpoint on this machine: itself, or while the block runs a copy of a remote one, with
    `only_facts` of its index and facts alone.

    Raises:
        CheckpointError: there is none, or its index and facts are not what was written, before any of it is read.
    """
    path = found.path.rstrip("/")
    commit = found.commit or commit_beside(path)
    if commit is None or not storage.exists(path):
        raise CheckpointError(f"{path}: no complete checkpoint: the folder or its commit file is missing.")
    name = path.rpartition("/")[2]
    mine = {file: record for file, record in commit.files.items() if file.startswith(f"{name}/")}
    key_files = (f"{name}/{STATS}", f"{name}/{INDEX}")
    with contextlib.ExitStack() as stack:
        folder = storage.local_path(path)
        if storage.is_remote(path):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / name
            for file in key_files if only_facts else mine:
                copy(storage.join(found.folder, file), str(folder.parent / file), mine.get(file))
        for file in key_files if found.checked == "nothing" else ():
            if file not in mine or not matches(str(folder.parent / file), mine[file]):
                raise CheckpointError(f"{path}: {file} is not what was written. Use another checkpoint.")
        yield folder


def stored_config(name: Name) -> dict[str, Any]:
    """The configuration stored in a checkpoint: `model` (the architecture) and `flags`.

    Raises:
        CheckpointError: it is missing, or was made by a program that keeps no architecture in it.
    """
    found = resolve(name)
    config = read_facts(found).get("config")
    if not config or not config.get("model"):
        raise CheckpointError(f"{found.name} does not say which model it is of: give --model and its flags.")
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
        return resolve_architecture(flags)
    return ModelConfig.from_dict(stored_config(name)["model"], f"--model {name}")
