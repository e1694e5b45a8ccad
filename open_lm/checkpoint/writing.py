"""Checkpoint files from a snapshot: consolidated from rank 0, or shards from every rank."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from open_lm import storage
from open_lm.checkpoint import commit as commits
from open_lm.checkpoint import sharded
from open_lm.checkpoint.commit import Commit, FileRecord
from open_lm.checkpoint.snapshot import Snapshot
from open_lm.checkpoint.tree import flat
from open_lm.distributed import World
from open_lm.errors import StorageError

WRITE_ERRORS = (StorageError, OSError, RuntimeError)
"""How a disk that is full or broken is reported: torch.save raises a RuntimeError."""


@dataclass(frozen=True)
class Target:
    """Where and with which words a checkpoint is written."""

    folder: str
    name: str
    config: dict[str, Any]

    def commit(self, snapshot: Snapshot, files: dict[str, FileRecord], **facts: Any) -> Commit:
        """Publish the checkpoint that `files` make."""
        commit = Commit(snapshot.label, snapshot.step, files, {"kind": snapshot.kind, "config": self.config, **facts})
        commits.publish(self.folder, commit)
        return commit


def write_consolidated(target: Target, snapshot: Snapshot) -> Commit:
    """Write OpenLM's files from the whole tensors of rank 0, which alone calls this.

    Raises:
        StorageError, OSError, RuntimeError: something could not be written; nothing stays behind.
    """
    payloads = snapshot.payloads(target.name, {"config": target.config})
    try:
        files = {name: commits.save_file(target.folder, name, payload) for name, payload in payloads.items()}
    except BaseException:
        for name in payloads:
            storage.remove(storage.join(target.folder, name))
        raise
    return target.commit(snapshot, files)


def write_sharded(
    target: Target, snapshot: Snapshot, shards: str, world: World, group: dist.ProcessGroup | None
) -> Commit | None:
    """Write every rank's shards into the new folder `shards`; the commit on rank 0, None elsewhere.

    All ranks call this and all return or raise together. The folder must be one that all of them see.

    Raises:
        StorageError: a rank could not write, or rank 0 does not see all files; nothing stays behind there.
    """
    folder = storage.local_path(storage.join(target.folder, shards))
    tensors, values = flat(snapshot.tree)
    try:
        problem = _problem_of(lambda: folder.mkdir(parents=True, exist_ok=True))
        require_none(problem, group)
        sharded.write(folder, tensors, group)
        mine = list(folder.glob(f"__{world.rank}_*"))
        records: dict[str, FileRecord] = {}
        problem = _problem_of(lambda: records.update({p.name: commits.hashed(str(p)) for p in mine}))
        everyone = gathered((problem, records), group)
        require_none(next((why for why, _ in everyone if why), None), group)
        commit = None
        if world.is_master:

            def publish() -> None:
                nonlocal commit
                sharded.require_complete(folder)
                head = {**snapshot.head(target.name), **snapshot.stats, "config": target.config}
                payload = {**head, "values": values, "scaler": snapshot.scaler}
                files = {sharded.STATS: commits.save_file(str(folder), sharded.STATS, payload)}
                files |= {name: record for _, named in everyone for name, record in named.items()}
                files[sharded.INDEX] = commits.hashed(str(folder / sharded.INDEX))
                named = {f"{shards}/{name}": record for name, record in files.items()}
                require_sizes(target.folder, named)
                commit = target.commit(snapshot, named, shards=shards)

            problem = _problem_of(publish)
        require_none(problem, group)
        return commit
    except BaseException:
        if world.is_master:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def require_sizes(folder: str, files: dict[str, FileRecord]) -> None:
    """Check that rank 0 sees what the other ranks wrote.

    Raises:
        StorageError: it does not; the folder is not shared.
    """
    for name, record in files.items():
        path = Path(folder) / name
        if not path.is_file() or path.stat().st_size != record.size_bytes:
            raise StorageError(
                f"{path}: is not there on rank 0. Sharded checkpoints need a --logs that all nodes share."
            )


def remove_unfinished(folder: str) -> None:
    """Remove folders of shards that no commit file names: those of saves that were killed."""
    for path in storage.local_path(folder).glob(f"*{sharded.MARK}*"):
        commit = commits.commit_beside(str(path))
        if path.is_dir() and (commit is None or not any(name.startswith(path.name + "/") for name in commit.files)):
            shutil.rmtree(path, ignore_errors=True)


def _problem_of(work: Callable[[], Any]) -> str | None:
    try:
        work()
    except WRITE_ERRORS as error:
        return str(error) or type(error).__name__
    return None


def gathered(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """The value of every rank of `group`, on every rank."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def require_none(problem: str | None, group: dist.ProcessGroup | None) -> None:
    """Raise on every rank what went wrong on any.

    Raises:
        StorageError: there was a problem.
    """
    found = next((why for why in gathered(problem, group) if why), None)
    if found:
        raise StorageError(found)
