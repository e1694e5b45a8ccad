"""How a file is copied between stores, all or nothing, and checked on arrival."""

from __future__ import annotations

import shutil

from open_lm import storage
from open_lm.checkpoint.commit import FileRecord, hashed
from open_lm.errors import StorageError

BLOCK_BYTES = 8 << 20


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
