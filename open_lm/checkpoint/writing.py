"""Checkpoint files from a snapshot: consolidated from rank 0, or shards from every rank."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from open_lm import storage
from open_lm.checkpoint import commit as commits
from open_lm.checkpoint import sharded
from open_lm.checkpoint.checksum import FileRecord
from open_lm.checkpoint.commit import Commit
from open_lm.checkpoint.retention import Retention
from open_lm.checkpoint.snapshot import Snapshot
from open_lm.checkpoint.together import gathered, problem_of, require_none
from open_lm.checkpoint.tree import flat
from open_lm.distributed import World
from open_lm.errors import FolderLocked, StorageError


@dataclass(frozen=True)
class Target:
    """Destination and metadata of a checkpoint."""

    folder: str
    name: str
    config: dict[str, Any]
    retention: Retention
    branch: int = 0
    require_owner: Callable[[], None] = lambda: None
    """Raises where this run no longer owns its folder; asked before each commit."""
    before_commit: Callable[[], None] = lambda: None
    """Copies the logs, which have to be there before the checkpoint is."""

    def commit(self, snapshot: Snapshot, files: dict[str, FileRecord], **facts: Any) -> Commit:
        """Publish the checkpoint that `files` make."""
        stated = {
            "kind": snapshot.kind,
            "branch": self.branch,
            "name": self.name,
            "tokens": snapshot.tokens,
            "evaluation_metrics": snapshot.stats["evaluation_metrics"],
            "config": self.config,
        }
        commit = Commit(snapshot.label, snapshot.step, files, {**stated, **facts})
        self.before_commit()
        self.require_owner()
        commits.publish(self.folder, commit)
        return commit

    def save_file(self, name: str, payload: Any) -> FileRecord:
        """Write one file, if the folder is still this run's."""
        self.require_owner()
        return commits.save_file(self.folder, name, payload)

    def withdraw(self, names: Iterable[str]) -> None:
        """Remove the files of a save that failed; in a folder that another run has taken over they may be its own."""
        with contextlib.suppress(FolderLocked):
            self.require_owner()
            for name in names:
                storage.remove(storage.join(self.folder, name))


@contextlib.contextmanager
def without_zip_checksums() -> Iterator[None]:
    """torch.save computes no CRC of its own: ours covers the whole file."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def write_consolidated(target: Target, snapshot: Snapshot) -> Commit:
    """Write OpenLM's files from the whole tensors of rank 0, which alone calls this.

    Raises:
        StorageError, OSError, RuntimeError: something could not be written; nothing stays behind.
    """
    payloads = snapshot.payloads(target.name, {"config": target.config})
    with target.retention.unfinished(snapshot.label, list(payloads)), without_zip_checksums():
        try:
            records = commits.in_parallel(
                partial(target.save_file, name, payload) for name, payload in payloads.items()
            )
            return target.commit(snapshot, dict(zip(payloads, records, strict=True)))
        except BaseException:
            target.withdraw(payloads)
            raise


def write_sharded(
    target: Target, snapshot: Snapshot, shards: str, world: World, group: dist.ProcessGroup | None
) -> Commit | None:
    """Write every rank's shards into the new folder `shards`; the commit on rank 0, None elsewhere.

    All ranks call this and all return or raise together. The folder must be one that all of them see.

    Raises:
        StorageError: a rank could not write, or rank 0 does not see all files; nothing stays behind there.
    """
    folder = storage.local_path(storage.join(target.folder, shards))
    marker = target.retention.unfinished(snapshot.label, [shards])
    with contextlib.ExitStack() as stack:
        problem = problem_of(lambda: stack.enter_context(marker)) if world.is_master else None
        problem = problem or problem_of(lambda: folder.mkdir(parents=True, exist_ok=True))
        require_none(problem, group)
        return _write_shards(target, snapshot, folder, world, group)


def _write_shards(
    target: Target,
    snapshot: Snapshot,
    folder: Path,
    world: World,
    group: dist.ProcessGroup | None,
) -> Commit | None:
    """Write into `folder`, which exists, and commit on rank 0; the folder goes where that fails."""
    tensors, values = flat(snapshot.tree)
    made: list[Commit] = []
    try:
        with without_zip_checksums():
            everyone = gathered(sharded.write(folder, tensors, group), group)
        records = {name: record for named in everyone for name, record in named.items()}
        work = partial(_commit_shards, target, snapshot, folder, values, records, made)
        require_none(problem_of(work) if world.is_master else None, group)
        return made[0] if made else None
    except BaseException:
        if world.is_master and not made:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _commit_shards(
    target: Target,
    snapshot: Snapshot,
    folder: Path,
    values: dict[str, Any],
    records: dict[str, FileRecord],
    made: list[Commit],
) -> None:
    """Write what rank 0 adds, and publish."""
    sharded.require_complete(folder)
    payload = shards_payload(target, snapshot, values)
    files = {sharded.STATS: commits.save_file(str(folder), sharded.STATS, payload), **records}
    named = {f"{folder.name}/{name}": record for name, record in files.items()}
    require_sizes(target.folder, named)
    made.append(target.commit(snapshot, named, shards=folder.name))


def shards_payload(target: Target, snapshot: Snapshot, values: dict[str, Any]) -> dict[str, Any]:
    """The content of `stats.pt` for tensors that lie in shards."""
    head = {**snapshot.head(target.name), **snapshot.stats, "config": target.config}
    return {**head, "values": values, "scaler": snapshot.scaler}


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
