"""Names of checkpoints resolved: a file, a run folder, a folder of transformers, hf://…, globs, `latest`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from open_lm import storage
from open_lm.checkpoint.commit import Commit, commit_beside, committed, hashes_match
from open_lm.checkpoint.sharded import is_sharded
from open_lm.errors import CheckpointError
from open_lm.weights.hub import download, is_hub

SUFFIXES = (".pt", ".safetensors", ".bin")
WILD = re.compile(r"[*?\[]")


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


def checkpoint_folder(folder: str) -> str:
    """Where a run keeps its checkpoints: `folder/checkpoints`, or `folder` itself when it is that folder."""
    inside = storage.join(folder, "checkpoints")
    return inside if storage.exists(inside) else folder


def newest(folder: str) -> Commit | None:
    """The newest checkpoint in `folder` that is complete and undamaged; damaged ones are skipped with a warning.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
    """
    commits = committed(folder)
    for commit in commits:
        if hashes_match(folder, commit):
            return commit
    if commits:
        raise CheckpointError(
            f"{folder}: all {len(commits)} checkpoints are damaged (see the warnings above). "
            "Restore one of them from a copy, or start anew under another --name."
        )
    return None


def latest(folder: str) -> str | None:
    """The epoch_K.pt of the newest complete checkpoint of a run (or checkpoint) folder; None when there is none."""
    inside = checkpoint_folder(folder)
    commit = newest(inside)
    return storage.join(inside, commit.weights_name) if commit else None


def all_checkpoints(names: Iterable[str], flag: str) -> list[str]:
    """Every checkpoint that `names` mean, each once: names as given, the checkpoints of one in order of steps.

    A run folder (or checkpoint folder) means all its complete checkpoints; one that OpenLM wrote every epoch_K.pt.

    Raises:
        CheckpointError: a name means none; the message begins with `flag`.
    """
    return list(dict.fromkeys(path for name in names for path in _meant(name, flag)))


def _meant(name: str, flag: str) -> list[str]:
    if WILD.search(name):
        matches = [match for match in sorted(storage.glob(name), key=_natural) if not match.endswith(".json")]
        return _found([path for match in matches for path in _meant(match, flag)], name, flag)
    if is_hub(name) or is_transformers_folder(name) or name.endswith(SUFFIXES):
        return [name]
    folder = checkpoint_folder(name)
    commits = sorted(committed(folder), key=lambda commit: commit.step)
    if commits:
        return [storage.join(folder, commit.weights_name) for commit in commits]
    return _found(sorted(storage.glob(storage.join(folder, "epoch_*.pt")), key=_natural), name, flag)


def _found(paths: list[str], name: str, flag: str) -> list[str]:
    if not paths:
        raise CheckpointError(f"{flag} {name}: no checkpoints there. Give epoch_K.pt files, a glob, or a run's folder.")
    return paths


def _natural(path: str) -> list[str | int]:
    """A key that sorts epoch_2 before epoch_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]
