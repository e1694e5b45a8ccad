"""Names of checkpoints resolved, once: `resolve(name)` says where a checkpoint is and of which kind.

A name is a file of weights, an epoch_K.commit.json (or epoch_K.left-behind.json), a folder of shards, a run folder (its
newest checkpoint), a folder of transformers, or hf://owner/name[@revision]; local or remote.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from open_lm import storage
from open_lm.checkpoint.commit import (
    COMMITTED,
    LEFT_BEHIND,
    Checked,
    Commit,
    Verdicts,
    commit_beside,
    committed,
    is_sharded,
    require_sound,
)
from open_lm.errors import CheckpointError
from open_lm.weights.hub import SCHEME, download

SUFFIXES = (".pt", ".safetensors", ".bin")
WILD = re.compile(r"[*?\[]")

Form = Literal["file", "shards", "folder"]
"""A file of weights; a folder that every rank wrote its shards to; a folder of transformers, with a config.json."""


@dataclass(frozen=True)
class Found:
    """A checkpoint: the name it was asked for by, where it is, its commit file if it has one, and what was checked."""

    name: str
    path: str
    kind: Form
    commit: Commit | None = None
    checked: Checked = "nothing"

    @property
    def folder(self) -> str:
        """The folder that holds it; a folder of transformers is that itself."""
        return self.path if self.kind == "folder" else storage.parent(self.path)

    def checked_for(self, part: Checked, known: Verdicts = MappingProxyType({})) -> Found:
        """The same once `part` of its files have the checksums they were written with; none is read twice, nor one of
        which it is `known`.

        Raises:
            CheckpointError: one has not.
        """
        if self.commit is None or part == "nothing" or self.checked in (part, "all"):
            return self
        require_sound(self.commit, self.path, part, known)
        return replace(self, checked=part)


Name = str | PathLike[str] | Found
"""A checkpoint as callers give it: its name, or the result of an earlier `resolve`."""


def resolve(name: Name, check: Checked = "nothing", known: Verdicts = MappingProxyType({})) -> Found:
    """The checkpoint that `name` means; of a run folder the newest complete one that passes `check`.

    Raises:
        CheckpointError: there is none, or it is damaged.
        StorageError: it cannot be downloaded.
    """
    if isinstance(name, Found):
        return name.checked_for(check, known)
    asked = fspath(name)
    path = str(download(asked)) if is_hub(asked) else asked
    if is_transformers_folder(path):
        return Found(asked, path, "folder")
    found = _file_or_shards(asked, path, check, known)
    if found is not None:
        return found
    if not storage.exists(path):
        raise CheckpointError(f"{asked}: no such checkpoint. Give an epoch_K.pt or the folder of a run.")
    found = newest_in(path, check, known)
    if found is not None:
        return replace(found, name=asked)
    if len(only := _weights_right_in(path)) == 1:
        return Found(asked, only[0], "file")
    raise CheckpointError(f"{asked}: no complete checkpoint in this folder. Give an epoch_K.pt or a run's folder.")


def _file_or_shards(name: str, path: str, check: Checked, known: Verdicts) -> Found | None:
    """The checkpoint that `path` names as a file, a commit file or a folder of shards; None where it is a folder."""
    is_file, in_shards = _is_file(path), is_sharded(path)
    if not in_shards and (path.endswith((COMMITTED, LEFT_BEHIND)) or (path.endswith(".pt") and not is_file)):
        commit = commit_beside(path.replace(COMMITTED, ".pt").replace(LEFT_BEHIND, ".pt"))
        if commit is None:
            return None
        path = storage.join(storage.parent(path), commit.weights_name)
    elif in_shards or is_file:
        commit = commit_beside(path)
    else:
        return None
    if commit is not None:
        require_sound(commit, path, check, known)
    return Found(name, path, "shards" if is_sharded(path) else "file", commit, check if commit else "nothing")


def _is_file(path: str) -> bool:
    """Whether `path` names a file of weights, local or remote, that is there."""
    if storage.is_remote(path):
        return path.endswith(SUFFIXES) and storage.exists(path)
    return storage.local_path(path).is_file()


def found_in(folder: str, commit: Commit, checked: Checked = "nothing") -> Found:
    """The checkpoint `commit` of `folder`."""
    path = storage.join(folder, commit.weights_name)
    return Found(folder, path, "shards" if is_sharded(path) else "file", commit, checked)


def is_hub(name: str) -> bool:
    """Whether `name` is that of a model on the Hub."""
    return name.startswith(SCHEME)


def is_transformers_folder(path: str) -> bool:
    """Whether `path` is a local folder with a config.json."""
    return not storage.is_remote(path) and (storage.local_path(path) / "config.json").is_file()


def _weights_right_in(folder: str) -> list[str]:
    """The files of weights in a folder that is no run: as repositories on the Hub hold them."""
    if storage.is_remote(folder):
        return []
    return [str(p) for p in sorted(Path(storage.local_path(folder)).iterdir()) if p.suffix in SUFFIXES]


def checkpoint_folder(folder: str) -> str:
    """The checkpoints of a run: `folder/checkpoints`, or `folder` itself when it is that folder."""
    inside = storage.join(folder, "checkpoints")
    return inside if storage.exists(inside) else folder


def newest_in(folder: str, check: Checked = "nothing", known: Verdicts = MappingProxyType({})) -> Found | None:
    """The newest complete checkpoint of a run (or checkpoint) folder that passes `check`; damaged ones are skipped
    with a warning. None when there is none.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
    """
    inside = checkpoint_folder(folder)
    commits = committed(inside)
    for commit in commits:
        try:
            return replace(found_in(inside, commit), name=folder).checked_for(check, known)
        except CheckpointError:
            continue  # the warning names the file
    if commits:
        raise CheckpointError(
            f"{inside}: all {len(commits)} checkpoints are damaged (see the warnings above). "
            "Restore one of them from a copy, or start a new run under another --name."
        )
    return None


def all_checkpoints(names: Iterable[str], flag: str) -> list[str]:
    """Every checkpoint that `names` mean, each once: names as given, the checkpoints of one as the run made them.

    A run folder (or checkpoint folder) means all its complete checkpoints; one that OpenLM wrote every epoch_K.pt.

    Raises:
        CheckpointError: a name means none; the message begins with `flag`.
    """
    return list(dict.fromkeys(path for name in names for path in _meant(name, flag)))


def _meant(name: str, flag: str) -> list[str]:
    if WILD.search(name):
        matches = [match for match in sorted(storage.glob(name), key=_natural) if not match.endswith(".json")]
        return _found([path for match in matches for path in _meant(match, flag)], name, flag)
    if is_hub(name) or is_transformers_folder(name) or name.endswith(SUFFIXES) or is_sharded(name):
        return [name]
    folder = checkpoint_folder(name)
    commits = committed(folder)
    if commits:
        return [storage.join(folder, commit.weights_name) for commit in reversed(commits)]
    return _found(sorted(storage.glob_in(folder, "epoch_*.pt"), key=_natural), name, flag)


def _found(paths: list[str], name: str, flag: str) -> list[str]:
    if not paths:
        raise CheckpointError(f"{flag} {name}: no checkpoints there. Give epoch_K.pt files, a glob, or a run's folder.")
    return paths


def _natural(path: str) -> list[str | int]:
    """A key that sorts epoch_2 before epoch_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]
