"""Remote shards on local disk: blocks of 4 MiB, fetched once for all processes of a machine, the least used removed.

Every sample of a shard is used within a pass, though at different times and by different readers: kept in blocks on
disk, a shard is read over the network once. A block's name holds the shard's url, size, tag and checksum, so that
another content under the same url is another block. Readers open a block for each read: what is removed is gone at
once, and none stays open.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import orjson

from open_lm import storage
from open_lm.data.manifest import Shard
from open_lm.data.shards import ShardIndex, read_index, regular_index
from open_lm.errors import DataError, StorageError
from open_lm.storage import remote

log = logging.getLogger(__name__)

BLOCK_BYTES = 4 << 20
_AT_ONCE = 16
_LOCKS = 512
_TOUCH_SECONDS = 20.0
_OLD_STAT_SECONDS = 7 * 86400


class RemoteShard(NamedTuple):
    """A remote file of one content: `key` stands for url, size, tag and checksum."""

    url: str
    key: str
    size_bytes: int
    etag: str | None

    @property
    def n_blocks(self) -> int:
        return -(-self.size_bytes // BLOCK_BYTES)


class BlockCache:
    """Blocks of remote shards in a local `folder`, at most about `limit_bytes` of them.

    `session` names the run: processes of one run look at a shard's size and tag once together.
    """

    def __init__(self, folder: str, limit_bytes: float, session: str):
        self.folder, self.limit_bytes, self.session = str(storage.local_path(folder)), limit_bytes, session
        self.bytes_fetched = self.n_requests = 0
        self._start()
        try:
            os.makedirs(os.path.join(self.folder, "locks"), exist_ok=True)
        except OSError as error:
            raise StorageError(f"--data-cache {folder}: cannot write there ({error.strerror}).") from error

    def _start(self) -> None:
        self._known: dict[tuple[str, str | None], RemoteShard] = {}
        self._touched: dict[str, float] = {}
        self._pending: dict[str, Future[None]] = {}
        self._fetched: set[str] = set()
        self._n_again, self._warned, self._added_bytes = 0, False, limit_share(self.limit_bytes)
        self._pool: ThreadPoolExecutor | None = None
        self._guard, self._process = threading.Lock(), os.getpid()

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "limit_bytes": self.limit_bytes, "session": self.session}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, bytes_fetched=0, n_requests=0)
        self._start()

    def find(self, shard: Shard) -> RemoteShard:
        """The content now under a shard's url.

        Raises:
            StorageError: it is missing or cannot be reached.
            DataError: it does not have the size its manifest gives.
        """
        known = self._known.get((shard.url, shard.crc32))
        if known is None:
            size, etag = self._stat(shard.url)
            if shard.size_bytes not in (None, size):
                raise DataError(
                    f"the manifest says {shard.size_bytes} bytes, the file has {size}; make the manifest again"
                )
            key = _digest(f"{shard.url}\0{size}\0{etag}\0{shard.crc32}")
            known = self._known[shard.url, shard.crc32] = RemoteShard(shard.url, key, size, etag)
        return known

    def size_bytes(self, shard: Shard) -> int:
        """The size of a shard, asked for once by all processes of the run."""
        return self._stat(shard.url)[0]

    def _stat(self, url: str) -> tuple[int, str | None]:
        path = os.path.join(self.folder, f"{_digest(f'{url} {self.session}')}.stat")
        with self._alone("stat", path):
            with contextlib.suppress(FileNotFoundError, orjson.JSONDecodeError), open(path, "rb") as file:
                size, etag = orjson.loads(file.read())
                return size, etag
            found = remote.stat(url)
            self.n_requests += 1
            _write(path, orjson.dumps(list(found)))
            return found

    def read_into(self, shard: RemoteShard, offset: int, view: memoryview) -> int:
        """Fill `view` from byte `offset`; how many bytes there were."""
        filled = 0
        while filled < len(view) and offset + filled < shard.size_bytes:
            block, inside = divmod(offset + filled, BLOCK_BYTES)
            n = self._read_block(shard, block, inside, view[filled:])
            if not n:
                break
            filled += n
        return filled

    def read(self, shard: RemoteShard, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop`; fewer where the file ends."""
        content = bytearray(max(0, min(stop, shard.size_bytes) - start))
        return bytes(content[: self.read_into(shard, start, memoryview(content))])

    def _read_block(self, shard: RemoteShard, block: int, inside: int, view: memoryview) -> int:
        path = self._path(shard, block)
        for _ in range(5):  # another process may remove it between fetch and read
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                self.fetch(shard, [block])
                continue
            try:
                if os.fstat(descriptor).st_size != _block_size(shard, block):  # cut off by a crash of the machine
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
                    continue
                self._touch(path)
                return os.preadv(descriptor, (view[: BLOCK_BYTES - inside],), inside)
            finally:
                os.close(descriptor)
        raise StorageError(f"--data-cache {self.folder}: blocks are removed before they are read. Raise the limit.")

    def _touch(self, path: str) -> None:
        """Mark the block as used now: others go first."""
        now = time.monotonic()
        if now - self._touched.get(path, 0) > _TOUCH_SECONDS:
            self._touched[path] = now
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)

    def fetch(self, shard: RemoteShard, blocks: Iterable[int]) -> None:
        """Have these blocks on disk when it returns, several requests at a time.

        Raises:
            StorageError: one cannot be read or written.
        """
        for waiting in [self._begin(shard, block) for block in blocks]:
            if waiting is not None:
                waiting.result()

    def fetch_ahead(self, shard: RemoteShard, blocks: Iterable[int]) -> None:
        """Begin to fetch; what fails is tried again, and raised, when it is read."""
        for block in blocks:
            self._begin(shard, block)

    def _begin(self, shard: RemoteShard, block: int) -> Future[None] | None:
        path = self._path(shard, block)
        if self._process != os.getpid():
            self._start()  # in a forked worker, where the threads of the parent do not exist
        with self._guard:
            running = self._pending.get(path)
            if running is not None and not running.done():
                return running
            if os.path.exists(path):
                self._pending.pop(path, None)
                return None
            self._pool = self._pool or ThreadPoolExecutor(_AT_ONCE, "data-cache")
            self._pending[path] = started = self._pool.submit(self._fetch_block, shard, block, path)
            if len(self._pending) > 4096:
                self._pending = {name: one for name, one in self._pending.items() if not one.done()}
            return started

    def _fetch_block(self, shard: RemoteShard, block: int, path: str) -> None:
        with self._alone("block", path):
            if os.path.exists(path):
                return
            start = block * BLOCK_BYTES
            stop = start + _block_size(shard, block)
            try:
                content = remote.read_range(shard.url, start, stop, shard.etag)
            except remote.RangesIgnored as whole:  # a server that sends the whole file: keep all of it
                self._count(path, len(whole.content))
                if len(whole.content) != shard.size_bytes:
                    raise StorageError(f"{storage.shown(shard.url)}: changed during the read. Start again.") from None
                for k in range(shard.n_blocks):
                    self._store(self._path(shard, k), whole.content[k * BLOCK_BYTES : (k + 1) * BLOCK_BYTES])
                return
            self._count(path, len(content))
            if len(content) != stop - start:
                raise StorageError(f"{storage.shown(shard.url)}: got {len(content)} of {stop - start} bytes.")
            self._store(path, content)

    def _count(self, path: str, n_bytes: int) -> None:
        self.n_requests += 1
        self.bytes_fetched += n_bytes
        self._n_again += path in self._fetched
        self._fetched.add(path)
        if not self._warned and self._n_again > max(64, len(self._fetched) // 10):
            self._warned = True
            log.warning(
                "--data-cache-gb %g: too little, blocks are fetched again that were removed before they were used up. "
                "Raise it, or lower --shuffle-lanes.",
                self.limit_bytes / 1e9,
            )

    def _store(self, path: str, content: bytes) -> None:
        try:
            _write(path, content)
        except OSError:
            self._make_room(self.limit_bytes / 2)
            try:
                _write(path, content)
            except OSError as error:
                raise storage_full(self.folder, error) from error
        self._added_bytes += len(content)
        if self._added_bytes >= limit_share(self.limit_bytes):
            self._added_bytes = 0
            self._make_room(self.limit_bytes, path)

    def _make_room(self, limit_bytes: float, kept: str = "") -> None:
        """Remove the least used blocks until the rest fits, and what was noted of earlier runs' shards."""
        found = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                if entry.name.endswith(".stat") and time.time() - status.st_mtime > _OLD_STAT_SECONDS:
                    os.unlink(entry.path)
                if not entry.is_dir() and not entry.name.endswith((".stat", ".lock")):
                    found.append((status.st_mtime, status.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= limit_bytes:
                return
            if path != kept:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                total -= size

    def index(self, shard: RemoteShard, key: str) -> ShardIndex:
        """Offsets of a shard's samples, found once for all processes; all of it is fetched, unless it is regular.

        Raises:
            DataError: it is damaged, or holds no samples.
        """
        path = os.path.join(self.folder, f"{shard.key}.{key}.index")
        with self._alone("index", path):
            with contextlib.suppress(FileNotFoundError):
                return _load_index(path)
            found = self._make_index(shard, key)
            _write(path, _dump_index(found))
            return found

    def _make_index(self, shard: RemoteShard, key: str) -> ShardIndex:
        shown = storage.shown(shard.url)
        if not shard.size_bytes:
            raise DataError(f"shard {shown}: an empty file. Write it again, or remove it from the manifest.")
        if key in ("auto", "npy") and (
            quick := regular_index(lambda start, stop: self.read(shard, start, stop), shard.size_bytes)
        ):
            return quick
        self.fetch(shard, range(shard.n_blocks))
        return read_index(self.read(shard, 0, shard.size_bytes), shown, key)

    def _path(self, shard: RemoteShard, block: int) -> str:
        return f"{self.folder}/{shard.key}.{block}"

    @contextlib.contextmanager
    def _alone(self, kind: str, path: str) -> Iterator[None]:
        """One process or thread at a time makes the block, index or stat at `path`.

        Each kind has its own locks: who makes an index waits for blocks, who fetches a block waits for nobody.
        """
        number = int(_digest(path), 16) % _LOCKS
        with open(os.path.join(self.folder, "locks", f"{kind}{number:03d}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def limit_share(limit_bytes: float) -> float:
    """Bytes that one process adds before it looks whether there is too much."""
    return min(limit_bytes / 50, 1 << 30)


def storage_full(folder: str, error: OSError) -> StorageError:
    """The error a user sees when a block cannot be written."""
    return StorageError(
        f"--data-cache {folder}: cannot write ({error.strerror}). Free space, or lower --data-cache-gb."
    )


def _block_size(shard: RemoteShard, block: int) -> int:
    return min(BLOCK_BYTES, shard.size_bytes - block * BLOCK_BYTES)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _write(path: str, content: bytes) -> None:
    """Under its name it is whole; a crash of the machine may cut it off, which its size tells."""
    descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path), suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _dump_index(index: ShardIndex) -> bytes:
    head = orjson.dumps([index.key, len(index), index.layout])
    return head + b"\n" + index.offsets.tobytes() + index.sizes.tobytes() + index.header_sums.tobytes()


def _load_index(path: str) -> ShardIndex:
    with open(path, "rb") as file:
        key, n, layout = orjson.loads(file.readline())
        if layout:
            return ShardIndex.regular(key, tuple(layout), n)
        offsets, sizes = (np.frombuffer(file.read(8 * n), np.int64) for _ in range(2))
        return ShardIndex(key, n, offsets, sizes, np.frombuffer(file.read(4 * n), np.uint32))
