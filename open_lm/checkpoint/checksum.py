"""Checksums of files, tagged by algorithm: xxh3-128 as they are written; sha256 of older commits is verified."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import xxhash

from open_lm import faults, storage
from open_lm.errors import CheckpointError

BLOCK_BYTES = 8 << 20
DEFAULT = "xxh3-128"
ALGORITHMS: dict[str, Callable[[], Any]] = {DEFAULT: xxhash.xxh3_128, "sha256": hashlib.sha256}
"""By the name that stands before the colon of a checksum."""


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum (`ALGORITHM:HEX`) of a committed file."""

    size_bytes: int
    checksum: str

    @property
    def algorithm(self) -> str:
        """The algorithm of the checksum.

        Raises:
            CheckpointError: this program does not know it.
        """
        name = self.checksum.partition(":")[0]
        if name not in ALGORITHMS:
            raise CheckpointError(f"checksum {name!r} is not known here: a newer OpenLM wrote it. Update this one.")
        return name

    @classmethod
    def parse(cls, stored: dict[str, Any]) -> FileRecord:
        """The record as commit files hold it; older ones hold a sha256 alone."""
        checksum = stored["checksum"] if "checksum" in stored else f"sha256:{stored['sha256']}"
        return cls(int(stored["size_bytes"]), str(checksum))


class ChecksummingFile:
    """Passes writes on to a file and adds them to a checksum."""

    def __init__(self, file: IO[bytes] | None, algorithm: str = DEFAULT):
        """`file` None: nothing is written."""
        self._file, self._algorithm = file, algorithm
        self._sum, self._size = ALGORITHMS[algorithm](), 0

    def write(self, block: Any) -> int:
        self._sum.update(block)
        self._size += len(block)
        return len(block) if self._file is None else faults.at("file.write", self._file).write(block)

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def record(self) -> FileRecord:
        """Of all that was written."""
        return FileRecord(self._size, f"{self._algorithm}:{self._sum.hexdigest()}")


def checksum_of(content: bytes) -> str:
    """`ALGORITHM:HEX` of `content`."""
    return f"{DEFAULT}:{xxhash.xxh3_128(content).hexdigest()}"


def record_of(path: str, algorithm: str = DEFAULT) -> FileRecord:
    """Size and checksum of the file at `path` as it is."""
    summing = ChecksummingFile(None, algorithm)
    memory = memoryview(bytearray(BLOCK_BYTES))
    with storage.open_read(path) as file:
        while n_read := file.readinto(memory):  # type: ignore[attr-defined]
            summing.write(memory[:n_read])
    return summing.record()


def matches(path: str, record: FileRecord) -> bool:
    """Whether the file at `path` is what `record` says.

    Raises:
        CheckpointError: the record's algorithm is not known.
    """
    algorithm = record.algorithm
    if not storage.exists(path) or storage.size_bytes(path) != record.size_bytes:
        return False
    return record_of(path, algorithm) == record
