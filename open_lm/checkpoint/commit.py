"""Commit files: written last, they name every file of a checkpoint with size and hash.

A checkpoint labelled K is `epoch_K.pt`, `optimizer_K.pt`, `stats_K.pt` (OpenLM's names), or a folder of shards,
`epoch_K.sharded-XXXXXXXX`, and `epoch_K.commit.json`.
Without a commit file whose files all have the listed sizes there is no checkpoint, whatever lies in the folder: a kill
at any moment leaves the previous one or the new one, never a mix.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Literal, cast

from open_lm import storage
from open_lm.checkpoint.checksum import BLOCK_BYTES, ChecksummingFile, FileRecord, checksum_of, matches
from open_lm.errors import CheckpointError, StorageError
from open_lm.storage.remote import Stat

VERSION = 2
COMMITTED, LEFT_BEHIND = ".commit.json", ".left-behind.json"
"""Endings of commit files: of a checkpoint that counts, and of one that was set aside by going back."""
COMMIT_PATTERN = f"epoch_*{COMMITTED}"
SHARDS_SIGN = ".sharded-"
"""The mark of a folder of shards in its name: `epoch_3.sharded-1f2e3d4c`."""
FIRST_KEYS = {"label", "step", "files", "facts"}
"""All that commit files of the first version hold; later ones also hold their version and their own checksum."""
RECORD_KEYS = {"size_bytes", "checksum", "sha256"}
OWN_CHECKSUM = ',\n "checksum": "'
N_THREADS = 4
"""Files that are written, or whose checksums are computed, at the same time."""

Checked = Literal["nothing", "weights", "all"]
"""Files whose checksums are compared with the commit file: none, those that weights are in, or the optimizer's too."""
Verdicts = Mapping[str, str | None]
"""Faults of checkpoints, by identity; None: all files are as they were written."""


@dataclass(frozen=True)
class Commit:
    """A complete checkpoint: its label (the K of epoch_K.pt), the steps taken, its files, and facts about the run."""

    label: str
    step: int
    files: dict[str, FileRecord]
    facts: dict[str, Any]
    is_newer: bool = False
    """Whether a newer program wrote it, with keys that mean nothing here: it is read, and never deleted."""

    @property
    def weights_name(self) -> str:
        """The file of weights, or the folder of shards where there is no such file."""
        whole = f"epoch_{self.label}.pt"
        return self.facts["shards"] if whole not in self.files and "shards" in self.facts else whole

    @property
    def epoch(self) -> int:
        """The K of the label: 3, or 3 of `3-step120` for a checkpoint inside the fourth interval."""
        return int(self.label.partition("-")[0])

    @property
    def branch(self) -> int:
        """Number of times the run had gone back to an earlier checkpoint, leaving later ones behind, at this save."""
        return int(self.facts.get("branch", 0))

    @property
    def identity(self) -> str:
        """A text that differs for checkpoints whose files do."""
        content = json.dumps({name: record.checksum for name, record in self.files.items()}, sort_keys=True)
        return checksum_of(content.encode())

    @property
    def size_bytes(self) -> int:
        return sum(record.size_bytes for record in self.files.values())

    @property
    def commit_name(self) -> str:
        return f"epoch_{self.label}{COMMITTED}"


_READ: dict[str, tuple[Stat, Commit]] = {}
"""The remote commit files that were read, as they were then."""


def save_file(folder: str, name: str, payload: Any) -> FileRecord:
    """Write `payload` with torch.save to `folder/name`, whole or not at all.

    Raises:
        StorageError: no space is left or the folder cannot be written.
    """
    import torch  # here: who only reads commit files, such as `openlm ladder status`, does without

    with storage.open_atomic(storage.join(folder, name)) as file:
        summing = ChecksummingFile(file)
        torch.save(payload, cast("IO[bytes]", summing))
        return summing.record()


def publish(folder: str, commit: Commit) -> None:
    """Write the commit file: from here on the checkpoint exists."""
    storage.write_text(storage.join(folder, commit.commit_name), to_text(commit))


def to_text(commit: Commit) -> str:
    """The content of a commit file: JSON whose last key is the checksum of all text before it."""
    fields = {name: value for name, value in asdict(commit).items() if name != "is_newer"}
    head = json.dumps({"version": VERSION, **fields}, indent=1).removesuffix("\n}")
    return f'{head}{OWN_CHECKSUM}{checksum_of(head.encode())}"\n}}'


def from_text(content: str) -> Commit:
    """The commit that `to_text` wrote, or a program before or after this one.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is damaged.
    """
    loaded = json.loads(content)
    head, _, tail = content.rpartition(OWN_CHECKSUM)
    if set(loaded) != FIRST_KEYS and tail.rstrip() != f'{checksum_of(head.encode())}"\n}}':
        raise ValueError("its own checksum does not match")
    keys = set(loaded) | {key for record in loaded["files"].values() for key in record}
    is_newer = int(loaded.get("version", 1)) > VERSION or bool(
        keys - FIRST_KEYS - RECORD_KEYS - {"version", "checksum"}
    )
    files = {name: FileRecord.parse(record) for name, record in loaded["files"].items()}
    return Commit(loaded["label"], loaded["step"], files, loaded["facts"], is_newer)


def read_commit(path: str) -> Commit | None:
    """The commit file at `path`; None when it is damaged (a warning names it), or was deleted just now."""
    try:
        return from_text(storage.read_bytes(path).decode())
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        logging.warning("%s is damaged (%s): the checkpoint is skipped.", storage.shown(path), error)
    except StorageError:
        if storage.exists(path):
            raise
    return None


def committed(folder: str) -> list[Commit]:
    """The checkpoints of `folder` whose files all have the right size, the one to continue from first: those of the
    latest branch, by step. Of a remote folder a commit file that was read before is not read again."""
    there = storage.remote.listing(folder) if storage.is_remote(folder) else None
    if there is None:
        commits = [read_commit(path) for path in storage.glob_in(folder, COMMIT_PATTERN)]
    else:
        names = [name for name in sorted(there) if fnmatch(name, COMMIT_PATTERN) and "/" not in name]
        commits = [_read_once(storage.join(folder, name), there[name]) for name in names]
    complete = [commit for commit in commits if commit and _has_sizes(folder, commit, there)]
    return sorted(complete, key=lambda commit: (-commit.branch, -commit.step))


def _read_once(path: str, stat: Stat) -> Commit | None:
    known = _READ.get(path)
    if known is not None and stat.etag is not None and known[0] == stat:
        return known[1]
    commit = read_commit(path)
    if commit is not None:
        _READ[path] = stat, commit
    return commit


def _has_sizes(folder: str, commit: Commit, there: Mapping[str, Stat] | None) -> bool:
    for name, record in commit.files.items():
        path = storage.join(folder, name)
        if there is not None:
            found = there[name].size_bytes if name in there else None
        else:
            found = _size_of(path)
        if found != record.size_bytes:
            what = "is missing" if found is None else f"has {found} bytes instead of {record.size_bytes}"
            logging.warning("%s %s: checkpoint %s is skipped.", storage.shown(path), what, commit.commit_name)
            return False
    return True


def _size_of(path: str) -> int | None:
    try:
        return storage.size_bytes(path) if storage.exists(path) else None
    except StorageError:
        if storage.exists(path):
            raise
        return None  # it was deleted just now


def damaged_file(folder: str, commit: Commit, only: Collection[str] | None = None) -> str | None:
    """The first damaged file of the checkpoint (of those in `only`) and its fault, which is also logged; None when
    every file is as it was written."""
    wanted = [item for item in commit.files.items() if only is None or item[0] in only]
    with ThreadPoolExecutor(N_THREADS) as pool:
        sound = pool.map(lambda item: matches(storage.join(folder, item[0]), item[1]), wanted)
        for (name, _), is_sound in zip(wanted, sound, strict=True):
            if not is_sound:
                problem = f"{storage.join(folder, name)} does not have the hash it was written with."
                logging.warning("%s Its checkpoint is skipped.", problem)
                return problem
    return None


def require_sound(commit: Commit, path: str, part: Checked, known: Verdicts = MappingProxyType({})) -> None:
    """Compare `part` of a checkpoint's files with the checksums they were written with; `path` is that of its weights.
    One that is `known` is not read again.

    Raises:
        CheckpointError: a file is not what was written.
    """
    if part == "nothing":
        return
    if known and commit.identity in known:
        problem = known[commit.identity]
    else:
        own = path.rstrip("/").rpartition("/")[2]
        weights = frozenset(name for name in commit.files if name == own or name.startswith(f"{own}/"))
        problem = damaged_file(storage.parent(path), commit, only=weights if part == "weights" and weights else None)
    if problem:
        raise CheckpointError(f"{problem} Use --resume latest, or another checkpoint.")


def is_sharded(path: str) -> bool:
    """Whether `path` names the folder of a sharded checkpoint."""
    return SHARDS_SIGN in path.rstrip("/").rpartition("/")[2]


def commit_beside(weights_path: str) -> Commit | None:
    """The commit file of `.../epoch_K.pt`, of another of its files, or of a folder of shards, if there is one; that of
    a checkpoint that was set aside too.

    Raises:
        CheckpointError: it is damaged, so that nothing can be said of the file.
    """
    name = weights_path.rstrip("/").rpartition("/")[2]
    stem = name.partition(SHARDS_SIGN)[0] if SHARDS_SIGN in name else Path(name).stem
    label = stem.rpartition("_")[2]  # of epoch_3, or of an average: ema_0.999_1_3
    for ending in (COMMITTED, LEFT_BEHIND):
        path = storage.join(storage.parent(weights_path), f"epoch_{label}{ending}")
        if not storage.exists(path):
            continue
        commit, is_named = read_commit(path), stem.startswith("epoch_")
        if commit is None and (is_named or name in storage.read_bytes(path).decode(errors="replace")):
            raise CheckpointError(
                f"{storage.shown(path)} is damaged, so {name} cannot be verified. Use another checkpoint, or copy the "
                "file to a folder of its own to load it unverified."
            )
        is_part = commit is not None and any(file == name or file.startswith(f"{name}/") for file in commit.files)
        if is_part or (commit is not None and is_named):
            return commit
    return None


def copy(source: str, target: str, expected: FileRecord | None = None) -> None:
    """Copy the file at `source` to `target`, each local or remote; with `expected` what is copied is compared with it.

    Raises:
        StorageError: it could not be copied.
        CheckpointError: it is not what was expected; nothing is left at `target`.
    """
    with storage.open_read(source) as reader, storage.open_atomic(target) as writer:
        summing = ChecksummingFile(writer, expected.algorithm if expected else "xxh3-128")
        shutil.copyfileobj(reader, cast("IO[bytes]", summing), BLOCK_BYTES)
        if expected is not None and summing.record() != expected:
            raise CheckpointError(
                f"{storage.shown(source)} does not have the hash in its commit file: it is damaged. "
                "Use another checkpoint."
            )


def in_parallel(work: Iterable[Any]) -> list[Any]:
    """The results of calling each of `work`, several at a time; the first error is raised once all have ended."""
    with ThreadPoolExecutor(N_THREADS) as pool:
        futures = [pool.submit(task) for task in work]
    return [future.result() for future in futures]
