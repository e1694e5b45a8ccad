"""Disk cache of remote shards: whole files up to a size limit, prefetched, shared by a machine's processes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from open_lm import storage


class ShardCache:
    """Copies of remote shards in `folder`, the longest unused removed when they exceed `limit_bytes`."""

    def __init__(self, folder: str, limit_bytes: float):
        self.folder, self.limit_bytes = str(storage.local_path(folder)), limit_bytes
        os.makedirs(self.folder, exist_ok=True)
        self._ahead: ThreadPoolExecutor | None = None

    def local(self, url: str) -> str:
        """The path of a whole copy of `url`; it is fetched first where it is not there.

        Raises:
            StorageError: it cannot be read, or the folder cannot be written.
        """
        path = os.path.join(self.folder, hashlib.blake2b(url.encode(), digest_size=16).hexdigest() + ".tar")
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)  # used now: others go first
            return path
        with self._alone(path):
            if not os.path.exists(path):
                with storage.open_read(url) as source, storage.open_atomic(path) as target:
                    shutil.copyfileobj(source, target, 8 << 20)
                self._make_room(path)
        return path

    def fetch_ahead(self, urls: Iterable[str]) -> None:
        """Begin to fetch `urls` in the background; what fails is tried again, and said, when it is needed."""
        if self._ahead is None:
            self._ahead = ThreadPoolExecutor(4, "data-cache")
        for url in urls:
            self._ahead.submit(self.local, url)

    @contextlib.contextmanager
    def _alone(self, path: str) -> Iterator[None]:
        """One process or thread at a time fetches one shard."""
        with open(path.removesuffix(".tar") + ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, kept: str) -> None:
        found = []
        for entry in Path(self.folder).glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):
                found.append((entry.stat().st_mtime, entry.stat().st_size, str(entry)))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit_bytes:
                return
            if path != kept:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                total -= size

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_ahead": None}
