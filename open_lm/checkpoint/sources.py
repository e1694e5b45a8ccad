"""What a name of weights means: a file, a run, a folder of transformers, or a model on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.checkpoint.find import latest
from open_lm.checkpoint.hub import download, is_hub
from open_lm.checkpoint.transformers_folder import from_transformers
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
    if not is_transformers_folder(source):
        return load_file(weights_file(source))
    config, weights = from_transformers(storage.local_path(source))
    return {"state_dict": weights, **({"config": {"model": config.to_dict()}} if config else {})}


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
