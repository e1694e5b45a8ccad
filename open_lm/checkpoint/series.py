"""Which checkpoints a list of names means, in which order: files, globs, and run folders with all they hold."""

from __future__ import annotations

import re
from collections.abc import Iterable

from open_lm import storage
from open_lm.checkpoint.commit import committed
from open_lm.checkpoint.find import checkpoint_folder
from open_lm.checkpoint.hub import is_hub
from open_lm.checkpoint.sources import SUFFIXES, is_transformers_folder
from open_lm.errors import CheckpointError

WILD = re.compile(r"[*?\[]")


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
