"""Files of shards: their bytes, from local disks or through the block cache of remote ones."""

from __future__ import annotations

import logging
import os
import resource
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from open_lm import storage
from open_lm.data.cache import BLOCK_BYTES, BlockCache
from open_lm.data.cache_folder import open_cache
from open_lm.data.config import DataConfig
from open_lm.data.manifest import Shard
from open_lm.data.plan import DEFAULT_STRIPES
from open_lm.data.shards import ShardIndex, index_file
from open_lm.data.sources import Source
from open_lm.data.tar import BLOCK
from open_lm.errors import DataError, StorageError

log = logging.getLogger(__name__)


def open_files(sources: Sequence[Source], config: DataConfig, world_size: int) -> Files:
    """The bytes of all shards: of local files, or where some shard is remote through the run's block cache.

    Warns where the cache is smaller than what the stripes hold at a time.
    """
    remote = [shard for source in sources for shard in source.shards if storage.is_remote(shard.url)]
    if not remote:
        return _LocalFiles()
    cache = open_cache(config.data_cache, config.data_cache_gb, world_size=world_size)
    stripes = config.shuffle_lanes or DEFAULT_STRIPES
    known = sum(shard.size_bytes or 2 * BLOCK_BYTES * stripes for shard in remote)
    needed = min(2 * BLOCK_BYTES * stripes * len(sources), known)
    if needed > cache.limit_bytes:
        log.warning(
            "--data-cache %s: room for %.1f GB, but %d stripes need about %.1f GB at a time: blocks will be fetched "
            "more than once. Raise --data-cache-gb, free space, or lower --shuffle-lanes.",
            cache.folder,
            cache.limit_bytes / 1e9,
            stripes,
            needed / 1e9,
        )
    return _CachedFiles(cache)


class Files(Protocol):
    """The bytes of shards."""

    def check(self, shard: Shard) -> None:
        """Compare its size with the manifest's; DataError, ValueError or StorageError."""

    def index(self, shard: Shard, key: str) -> ShardIndex:
        """Offsets of its samples, from its headers."""

    def prepare(self, shards: Sequence[Shard], offsets: np.ndarray, size: int) -> None:
        """Prefetch remote ranges in parallel; a failure is raised when its range is read."""

    def read_into(self, shard: Shard, number: int, offset: int, view: memoryview) -> int:
        """Fill `view`; how many bytes there were."""

    def fetch_ahead(self, shard: Shard, offset: int, size: int) -> None:
        """Begin to fetch."""


class _LocalFiles:
    """Shards on local disks, kept open while they are used."""

    def __init__(self) -> None:
        self._open: OrderedDict[int, int] = OrderedDict()
        self._most = max(16, min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 - 64))

    def check(self, shard: Shard) -> None:
        if shard.size_bytes is not None and (found := storage.size_bytes(shard.url)) != shard.size_bytes:
            raise ValueError(
                f"the manifest says {shard.size_bytes} bytes, the file has {found}; make the manifest again"
            )

    def index(self, shard: Shard, key: str) -> ShardIndex:
        return index_file(shard.url, storage.shown(shard.url), key)

    def prepare(self, shards: Sequence[Shard], offsets: np.ndarray, size: int) -> None:
        pass

    def fetch_ahead(self, shard: Shard, offset: int, size: int) -> None:
        pass

    def read_into(self, shard: Shard, number: int, offset: int, view: memoryview) -> int:
        descriptor = self._open.get(number)
        if descriptor is None:
            descriptor = self._open[number] = os.open(storage.local_path(shard.url), os.O_RDONLY)
            if len(self._open) > self._most:
                os.close(self._open.popitem(last=False)[1])
        return os.preadv(descriptor, (view,), offset)

    def __getstate__(self) -> dict[str, object]:
        return {}  # descriptors stay with the process that has them

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()  # type: ignore[misc]


class _CachedFiles:
    """Remote shards through the block cache; local ones beside them."""

    def __init__(self, cache: BlockCache):
        self._cache, self._local = cache, _LocalFiles()

    def check(self, shard: Shard) -> None:
        if storage.is_remote(shard.url):
            self._cache.find(shard)
        else:
            self._local.check(shard)

    def index(self, shard: Shard, key: str) -> ShardIndex:
        if storage.is_remote(shard.url):
            return self._cache.index(self._cache.find(shard), key)
        return self._local.index(shard, key)

    def prepare(self, shards: Sequence[Shard], offsets: np.ndarray, size: int) -> None:
        for shard, offset in zip(shards, offsets.tolist(), strict=True):
            self.fetch_ahead(shard, offset, size)

    def fetch_ahead(self, shard: Shard, offset: int, size: int) -> None:
        if storage.is_remote(shard.url):
            try:
                found = self._cache.find(shard)
            except (StorageError, DataError):
                return  # raised when it is read
            first = max(0, offset - BLOCK) // BLOCK_BYTES
            self._cache.fetch_ahead(found, range(first, min(found.n_blocks, (offset + size - 1) // BLOCK_BYTES + 1)))

    def read_into(self, shard: Shard, number: int, offset: int, view: memoryview) -> int:
        if storage.is_remote(shard.url):
            return self._cache.read_into(self._cache.find(shard), offset, view)
        return self._local.read_into(shard, number, offset, view)
