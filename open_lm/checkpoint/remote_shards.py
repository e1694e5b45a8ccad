"""Sharded checkpoints straight to a remote folder: every rank sends its own part, no disk has to be shared."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from open_lm import storage
from open_lm.checkpoint import commit as commits
from open_lm.checkpoint import sharded
from open_lm.checkpoint.checksum import FileRecord
from open_lm.checkpoint.commit import Commit
from open_lm.checkpoint.snapshot import Snapshot
from open_lm.checkpoint.tree import flat
from open_lm.checkpoint.upload import upload
from open_lm.checkpoint.writing import Target, gathered, problem_of, require_none, shards_payload, without_zip_checksums
from open_lm.distributed import World

SCRATCH = ".shards-"
"""Prefix of the folders that a rank writes its part to before it is sent."""


def write_remote_shards(
    target: Target, snapshot: Snapshot, shards: str, world: World, group: dist.ProcessGroup | None, local: str
) -> Commit | None:
    """Write every rank's part below `local` on its own machine, and send it to `shards` in the remote folder of
    `target`; the commit on rank 0, None elsewhere.

    All ranks call this and all return or raise together.

    Raises:
        StorageError: a rank could not write or send; no commit is made.
    """
    tensors, values = flat(snapshot.tree)
    url = storage.join(target.folder, shards)
    with scratch(local, world.rank) as folder:
        with without_zip_checksums():
            mine = sharded.write(folder, tensors, group)
        sent = problem_of(lambda: _send(folder, url, mine))
        everyone = {name: record for named in gathered(mine, group) for name, record in named.items()}
        made: list[Commit] = []
        try:
            require_none(sent, group)
            work = partial(_commit, target, snapshot, folder, url, values, everyone, made)
            require_none(problem_of(work) if world.is_master else None, group)
        except BaseException:
            if world.is_master:
                _remove(url, everyone)
            raise
    return made[0] if made else None


@contextlib.contextmanager
def scratch(local: str, rank: int) -> Iterator[Path]:
    """A folder of this rank's own below `local` while the block runs; those of its killed saves go."""
    parent = storage.local_path(local)
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f"{SCRATCH}{rank}-*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f"{SCRATCH}{rank}-") as folder:
        yield Path(folder)


def _send(folder: Path, url: str, records: Mapping[str, FileRecord]) -> None:
    commits.in_parallel(
        partial(upload, folder / name, storage.join(url, name), record) for name, record in records.items()
    )


def _commit(
    target: Target,
    snapshot: Snapshot,
    folder: Path,
    url: str,
    values: dict[str, Any],
    records: Mapping[str, FileRecord],
    made: list[Commit],
) -> None:
    """Send what rank 0 adds, and publish."""
    sharded.require_complete(folder, {name: record.size_bytes for name, record in records.items()})
    stats = commits.save_file(str(folder), sharded.STATS, shards_payload(target, snapshot, values))
    _send(folder, url, {sharded.STATS: stats})
    shards = url.rpartition("/")[2]
    files = {f"{shards}/{name}": record for name, record in {sharded.STATS: stats, **records}.items()}
    made.append(target.commit(snapshot, files, shards=shards))


def _remove(url: str, names: Mapping[str, FileRecord]) -> None:
    """Take back what was sent of a save that failed, as far as the store can be reached."""
    with contextlib.suppress(Exception):
        for name in (*names, sharded.STATS):
            storage.remove(storage.join(url, name))
