"""Verification of checkpoints by all ranks together: of a sharded one each computes the checksums of its part."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from open_lm import storage
from open_lm.checkpoint.checksum import FileRecord
from open_lm.checkpoint.commit import Commit, Verdicts, damaged_file
from open_lm.checkpoint.resolve import resolve
from open_lm.distributed import World
from open_lm.errors import CheckpointError, StorageError


def verified_together(world: World, name: str) -> Verdicts:
    """The fault of the sharded checkpoint `name`, by its identity, None if it is sound; nothing of other ones, whose
    files not every rank may see. Every rank must call this.

    Raises:
        CheckpointError: there is none.
        StorageError: it cannot be read.
    """
    if world.size == 1:
        return {}
    found = world.on_rank0(lambda: resolve(name))
    if found.commit is None or "shards" not in found.commit.facts:
        return {}
    return {found.commit.identity: fault_of(world, found.folder, found.commit)}


def fault_of(world: World, folder: str, commit: Commit) -> str | None:
    """The fault of a checkpoint, None if every file is as it was written. Every rank must call this.

    A local file that cannot be read is a damaged one.

    Raises:
        StorageError: the remote `folder` cannot be read; on all ranks alike.
    """
    if world.size == 1 or "shards" not in commit.facts:
        found = [world.on_rank0(lambda: _look(folder, commit))]
    else:
        found = world.gather(_look(folder, commit, shares(commit.files, world.size)[world.rank]))
    for error in (error for _, error in found if error):
        raise StorageError(error)
    return next((fault for fault, _ in found if fault), None)


def _look(folder: str, commit: Commit, only: Collection[str] | None = None) -> tuple[str | None, str | None]:
    """The fault of the files in `only`, and the error that kept them from being read."""
    try:
        return damaged_file(folder, commit, only), None
    except CheckpointError as error:
        return str(error), None
    except (StorageError, OSError) as error:
        return (None, str(error)) if storage.is_remote(folder) else (str(error), None)


def shares(files: Mapping[str, FileRecord], n: int) -> list[list[str]]:
    """The files in `n` parts of about equal size."""
    parts: list[list[str]] = [[] for _ in range(n)]
    sizes = [0] * n
    for name, record in sorted(files.items(), key=lambda item: (-item[1].size_bytes, item[0])):
        least = sizes.index(min(sizes))
        parts[least].append(name)
        sizes[least] += record.size_bytes
    return parts
