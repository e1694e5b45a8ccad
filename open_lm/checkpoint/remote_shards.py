"""Sharded checkpoints straight to a remote folder: every rank sends its own part, no disk has to be shared."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from open_lm import storage
from open_lm.checkpoint import commit as commits
from open_lm.checkpoint import processes, sharded
from open_lm.checkpoint.checksum import FileRecord
from open_lm.checkpoint.commit import SHARDS_SIGN, Commit
from open_lm.checkpoint.retention import UNFINISHED
from open_lm.checkpoint.snapshot import Snapshot
from open_lm.checkpoint.together import gathered, outcome_of, problem_of, require_none
from open_lm.checkpoint.tree import flat
from open_lm.checkpoint.upload import upload
from open_lm.checkpoint.writing import Target, shards_payload, without_zip_checksums
from open_lm.distributed import World
from open_lm.errors import StorageError

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
    marker = storage.join(target.folder, f"epoch_{snapshot.label}{UNFINISHED}")
    begun = json.dumps({"label": snapshot.label, "names": [shards], "owner": processes.identity()})
    everyone: dict[str, FileRecord] = {}
    made: list[Commit] = []
    with contextlib.ExitStack() as stack:
        folder, problem = outcome_of(lambda: stack.enter_context(scratch(local, world.rank)))
        if world.is_master:
            problem = problem or problem_of(lambda: storage.write_text(marker, begun))
        try:
            require_none(problem, group)
            assert folder is not None
            with without_zip_checksums():
                mine = sharded.write(folder, tensors, group)
            sent = problem_of(lambda: _send(folder, url, mine))
            everyone |= {name: record for named in gathered(mine, group) for name, record in named.items()}
            require_none(sent, group)
            work = partial(_commit, target, snapshot, folder, url, values, everyone, made)
            require_none(problem_of(work) if world.is_master else None, group)
        except BaseException:
            if world.is_master and not made:
                _remove(url, everyone, marker)
            raise
    if world.is_master:
        with contextlib.suppress(StorageError):  # a later sweep finds that it is spoken for
            storage.remove(marker)
    return made[0] if made else None


@contextlib.contextmanager
def scratch(local: str, rank: int) -> Iterator[Path]:
    """A folder of this rank's own below `local` while the block runs; those of its killed saves go."""
    parent = storage.local_path(local)
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f"{SCRATCH}{rank}-*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f"{SCRATCH}{rank}-", ignore_cleanup_errors=True) as folder:
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


def _remove(url: str, names: Mapping[str, FileRecord], marker: str) -> None:
    """Take back what was sent of a save that failed; what the store does not let go of now, `sweep` deletes later."""
    with contextlib.suppress(Exception):
        for name in (*names, sharded.STATS):
            storage.remove(storage.join(url, name))
        storage.remove(marker)


def sweep(folder: str) -> None:
    """Delete from remote `folder` what saves sent that were killed before their commit; called by rank 0 of the run
    that continues there, between its saves.

    Such a save names what it sends in a file that it removes last. Its run may have been on another machine, where
    nobody can look: should it live after all, its commit would name files that are missing, and not count.
    """
    for path in storage.glob_in(folder, f"epoch_*{UNFINISHED}"):
        try:
            begun = json.loads(storage.read_text(path))
            names, owner = [str(name) for name in begun["names"]], begun["owner"]
        except (ValueError, KeyError, TypeError):
            continue
        if processes.is_here(owner) and processes.is_running(owner) and owner != processes.identity():
            continue
        others = [other for other in storage.glob_in(folder, "*.json") if not other.endswith(UNFINISHED)]
        spoken_for = "".join(storage.read_bytes(other).decode(errors="replace") for other in others)
        for name in names:
            if SHARDS_SIGN in name and name not in spoken_for:
                for left in storage.files_within(storage.join(folder, name)):
                    storage.remove(left)
        storage.remove(path)
