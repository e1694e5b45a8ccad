"""Uploads: a local file becomes a remote one straight from the disk, in parts, checked by the store as it arrives."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import IO, cast

from open_lm import faults, storage
from open_lm.checkpoint.checksum import BLOCK_BYTES, ChecksummingFile, FileRecord, record_of
from open_lm.errors import CheckpointError
from open_lm.storage import remote

PART_BYTES = 64 << 20
"""Size of the parts that a large file goes in, several at a time."""


def upload(path: Path, url: str, expected: FileRecord | None = None) -> None:
    """Copy the file at `path` to `url`, which appears whole or not at all; with `expected` nothing else is sent.

    What is sent to S3 carries a checksum for each part, which the store compares before it accepts it.

    Raises:
        CheckpointError: the file is not what is expected.
        StorageError: it did not arrive.
    """
    faults.at("upload", url)
    if not storage.is_remote(url):
        with open(path, "rb") as source, storage.open_atomic(url) as target:
            summing = ChecksummingFile(target, expected.algorithm if expected else "xxh3-128")
            shutil.copyfileobj(source, cast("IO[bytes]", summing), BLOCK_BYTES)
            _require(summing.record(), expected, path)
        return
    if expected is not None:
        _require(record_of(str(path), expected.algorithm), expected, path)
    size = path.stat().st_size
    files = remote.filesystem(url)
    parts = {"chunksize": PART_BYTES, "max_concurrency": 8} if url.startswith(("s3://", "s3a://")) else {}

    def send() -> None:
        files.put_file(str(path), url, **parts)
        if (found := files.size(url)) != size:
            raise OSError(f"{found} of {size} bytes arrived")

    remote.patiently("write", url, send)


def _require(found: FileRecord, expected: FileRecord | None, path: Path) -> None:
    if expected is not None and found != expected:
        raise CheckpointError(f"{path} does not have the hash it was written with: it is not copied.")
