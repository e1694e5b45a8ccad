"""Commit files: written last, they name every file of a checkpoint with size and hash.

A checkpoint labelled K is `epoch_K.pt`, `optimizer_K.pt`, `stats_K.pt` (OpenLM's names), or a folder of shards,
`epoch_K.sharded-XXXXXXXX`, and `epoch_K.commit.json`.
Without a commit file whose files all have the listed sizes there is no checkpoint, whatever lies in the folder: a kill
at any moment leaves the previous one or the new one, never a mix.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

from open_lm import storage
from open_lm.errors import StorageError

BLOCK_BYTES = 8 << 20
COMMIT_PATTERN = "epoch_*.commit.json"


@dataclass(frozen=True)
class FileRecord:
    """What a committed file must look like."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Commit:
    """A complete checkpoint: its label (the K of epoch_K.pt), the steps taken, its files, and facts about the run."""

    label: str
    step: int
    files: dict[str, FileRecord]
    facts: dict[str, Any]

    @property
    def weights_name(self) -> str:
        """What to name to load it: its file of weights, or its folder of shards where it has no such file."""
        whole = f"epoch_{self.label}.pt"
        return self.facts["shards"] if whole not in self.files and "shards" in self.facts else whole

    @property
    def size_bytes(self) -> int:
        return sum(record.size_bytes for record in self.files.values())

    @property
    def commit_name(self) -> str:
        return f"epoch_{self.label}.commit.json"


class HashingFile:
    """Passes writes on to a file and hashes them on the way."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, block: bytes) -> int:
        self._hash.update(block)
        self._size += len(block)
        return self._file.write(block)

    def flush(self) -> None:
        self._file.flush()

    def record(self) -> FileRecord:
        return FileRecord(self._size, self._hash.hexdigest())


def save_file(folder: str, name: str, payload: Any) -> FileRecord:
    """Write `payload` with torch.save to `folder/name`, whole or not at all.

    Raises:
        StorageError: no space is left or the folder cannot be written.
    """
    with storage.open_atomic(storage.join(folder, name)) as file:
        hashing = HashingFile(file)
        torch.save(payload, cast("IO[bytes]", hashing))
        return hashing.record()


def publish(folder: str, commit: Commit) -> None:
    """Write the commit file: from here on the checkpoint exists."""
    storage.write_text(storage.join(folder, commit.commit_name), json.dumps(asdict(commit), indent=1))


def read_commit(path: str) -> Commit | None:
    """The commit file at `path`; None when it does not parse (a warning names it)."""
    try:
        loaded = json.loads(storage.read_text(path))
        files = {name: FileRecord(**record) for name, record in loaded["files"].items()}
        return Commit(loaded["label"], loaded["step"], files, loaded["facts"])
    except (ValueError, KeyError, TypeError) as error:
        logging.warning("%s is damaged (%s): the checkpoint is passed over.", path, error)
        return None


def committed(folder: str) -> list[Commit]:
    """The checkpoints of `folder` whose files all have the right size, newest step first."""
    commits = [read_commit(path) for path in storage.glob(storage.join(folder, COMMIT_PATTERN))]
    return sorted((c for c in commits if c and _has_sizes(folder, c)), key=lambda commit: -commit.step)


def _has_sizes(folder: str, commit: Commit) -> bool:
    for name, record in commit.files.items():
        path = storage.join(folder, name)
        found = storage.size_bytes(path) if storage.exists(path) else None
        if found != record.size_bytes:
            what = "is missing" if found is None else f"has {found} bytes instead of {record.size_bytes}"
            logging.warning("%s %s: checkpoint %s is passed over.", path, what, commit.commit_name)
            return False
    return True


def hashed(path: str) -> FileRecord:
    """Size and hash of the file at `path` as it is."""
    digest, size = hashlib.sha256(), 0
    with storage.open_read(path) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return FileRecord(size, digest.hexdigest())


def hashes_match(folder: str, commit: Commit) -> bool:
    """Whether every file of the checkpoint still has the hash it was written with; a warning names one that has not."""
    for name, record in commit.files.items():
        path = storage.join(folder, name)
        if not storage.exists(path) or hashed(path) != record:
            logging.warning("%s does not have the hash it was written with: its checkpoint is passed over.", path)
            return False
    return True


def rename(folder: str, name: str, new_name: str) -> None:
    """Give a commit file another name, so that it counts no longer (or again)."""
    content = storage.read_text(storage.join(folder, name))
    storage.write_text(storage.join(folder, new_name), content)
    storage.remove(storage.join(folder, name))


def discard(folder: str, commit: Commit) -> None:
    """Delete a checkpoint, the commit file first, so that a half-deleted one does not count."""
    storage.remove(storage.join(folder, commit.commit_name))
    for name in commit.files:
        storage.remove(storage.join(folder, name))
    if "shards" in commit.facts and not storage.is_remote(folder):
        shutil.rmtree(storage.local_path(storage.join(folder, commit.facts["shards"])), ignore_errors=True)


def commit_beside(weights_path: str) -> Commit | None:
    """The commit file that belongs to `.../epoch_K.pt` or to a folder of shards, if there is one."""
    name = weights_path.rstrip("/").rpartition("/")[2]
    stem = name.partition(".sharded-")[0] if ".sharded-" in name else Path(name).stem
    path = storage.join(storage.parent(weights_path), f"{stem}.commit.json")
    return read_commit(path) if storage.exists(path) else None


def copy(source: str, target: str, expected: FileRecord | None = None) -> None:
    """Copy the file at `source` to `target`, each local or remote; with `expected` the copy is read back and compared.

    Raises:
        StorageError: it could not be copied, or is not what was expected.
    """
    with storage.open_read(source) as reader, storage.open_atomic(target) as writer:
        shutil.copyfileobj(reader, writer, BLOCK_BYTES)
    if expected is not None and hashed(target) != expected:
        storage.remove(target)
        raise StorageError(f"{storage.shown(target)}: what arrived is not what was sent. It is tried again later.")
