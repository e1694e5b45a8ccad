"""What a name of weights means: a file, a run, a folder of transformers, or a model on the Hub."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.checkpoint.commit import commit_beside, hashed
from open_lm.checkpoint.copying import copy
from open_lm.checkpoint.find import latest
from open_lm.checkpoint.hub import download, is_hub
from open_lm.checkpoint.sharded import INDEX, STATS, is_sharded, read_tensors
from open_lm.checkpoint.transformers_folder import from_transformers
from open_lm.checkpoint.tree import SEPARATOR
from open_lm.checkpoint.weights import load_file
from open_lm.errors import CheckpointError

SUFFIXES = (".pt", ".safetensors", ".bin")


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
    config, weights = from_transformers(storage.local_path(source))
    return {"state_dict": weights, **({"config": {"model": config.to_dict()}} if config else {})}


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


def local_source(path: str) -> str:
    """`path` itself, or the folder that a model on the Hub has been downloaded to."""
    return str(download(path)) if is_hub(path) else path


def is_transformers_folder(path: str) -> bool:
    """Whether `path` is a local folder with a config.json."""
    return not storage.is_remote(path) and (storage.local_path(path) / "config.json").is_file()


def weights_file(path: str) -> str:
    """The file of weights that `path` means; of a run folder the newest complete checkpoint.

    Raises:
        CheckpointError: there is none.
        StorageError: it cannot be downloaded.
    """
    path = local_source(path)
    if is_sharded(path):
        return path
    if path.endswith(".commit.json") or (path.endswith(".pt") and not storage.exists(path)):
        commit = commit_beside(path.replace(".commit.json", ".pt"))
        path = storage.join(storage.parent(path), commit.weights_name) if commit else path
        if is_sharded(path):
            return path
    if not storage.exists(path):
        raise CheckpointError(f"{path}: no such checkpoint. Give an epoch_K.pt or the folder of a run.")
    if (storage.is_remote(path) and path.endswith(SUFFIXES)) or storage.local_path(path).is_file():
        return path
    found = latest(path)
    if found is None and len(only := _weights_right_in(path)) == 1:
        return only[0]
    if found is None:
        raise CheckpointError(f"{path}: no complete checkpoint in this folder. Give an epoch_K.pt or a run's folder.")
    return found


def _weights_right_in(folder: str) -> list[str]:
    """The files of weights in a folder that is no run: as repositories on the Hub hold them."""
    if storage.is_remote(folder):
        return []
    return [str(p) for p in sorted(Path(storage.local_path(folder)).iterdir()) if p.suffix in SUFFIXES]
