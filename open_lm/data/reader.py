"""Sample reader: planned samples read from shards by offset, decoded and checked; bad ones are masked."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np

from open_lm import storage
from open_lm.data.cache import ShardCache
from open_lm.data.flat import FLAT_KEYS
from open_lm.data.manifest import Shard
from open_lm.data.pipeline import Filled
from open_lm.data.plan import identity, key, mix
from open_lm.data.shards import BLOCK, ShardIndex, check_header, check_ids, decode_member
from open_lm.data.sources import index_shard
from open_lm.errors import DataError, StorageError

_KEPT_INDEXES = 4096
_KEPT_FILES = 128
_REMOTE_BLOCK = 1 << 20
_REMOTE_BYTES = 1 << 30


def mark_of(urls: Sequence[str], index: np.ndarray) -> int:
    """A sum of 64 bits that tells which samples were read, in whatever order: number `index` of the shard at each url.

    The loader computes it again from the plan: proof that a step used the samples it was to use, each of them once.
    """
    shards = np.array([_identity(url) for url in urls], np.uint64)
    return int(mix(shards ^ mix(index.astype(np.uint64))).sum(dtype=np.uint64))


_identity = lru_cache(maxsize=1 << 18)(identity)


class SampleReader:
    """Reads samples of `seq_len` + 1 ids from the shards of all sources.

    A longer sample is cropped at a hash of `seed` and its place in the stream. Ids are below `vocab_size`.
    """

    def __init__(
        self,
        shards: Sequence[Sequence[Shard]],
        *,
        data_key: str,
        vocab_size: int,
        seq_len: int,
        seed: int = 0,
        cache: ShardCache | None = None,
    ):
        self.shards, self.data_key = [list(source) for source in shards], data_key
        self.vocab_size, self.seq_len = vocab_size, seq_len
        self._crop_key = key("crop", seed)
        self._indexes: OrderedDict[str, ShardIndex] = OrderedDict()
        self._announced: OrderedDict[str, None] = OrderedDict()
        self._files, self._cache = _Files(), cache

    def read(self, source: np.ndarray, shard: np.ndarray, index: np.ndarray, position: np.ndarray) -> Filled:
        """The samples (n, seq_len + 1) as int32, and (row, reason) of those that cannot be read: their rows are -1."""
        tokens = np.empty((len(index), self.seq_len + 1), np.int32)
        holes: list[tuple[int, str]] = []
        asked = [self.shards[s][k] for s, k in zip(source.tolist(), shard.tolist(), strict=True)]
        self._fetch(asked, index.tolist())
        for row, (one, at) in enumerate(zip(asked, index.tolist(), strict=True)):
            try:
                tokens[row] = self._cropped(self._sample_or_reason(one, at), int(position[row]))
            except ValueError as error:
                tokens[row] = -1
                holes.append((row, f"shard {storage.shown(one.url)}, sample {at}: {error}."))
        return Filled(tokens, holes, mark_of([shard.url for shard in asked], index))

    def _fetch(self, shards: list[Shard], indexes: list[int]) -> None:
        """Get what is remote side by side before it is used one by one."""
        wanted = []
        for shard, at in zip(shards, indexes, strict=True):
            if storage.is_remote(shard.url) and not self._cache:
                found = self._index_of(shard)
                if at < len(found):
                    start = max(0, int(found.offsets[at]) - BLOCK)
                    wanted.append((shard.url, start, int(found.offsets[at]) + int(found.sizes[at])))
        if wanted:
            self._files.fetch(wanted)

    def _sample_or_reason(self, shard: Shard, at: int) -> np.ndarray:
        """One sample; ValueError when it cannot be had. A copy that left the cache in between is fetched again."""
        for _ in range(10 if self._cache else 1):
            try:
                return self._sample(shard, at)
            except (FileNotFoundError, StorageError) as error:
                reason = str(error)
        raise ValueError(reason)

    def _sample(self, shard: Shard, at: int) -> np.ndarray:
        found = self._index_of(shard)
        if at >= len(found):
            raise ValueError(_miscounted(shard, found))
        offset, size = int(found.offsets[at]), int(found.sizes[at])
        if found.key in FLAT_KEYS:
            content = self._files.read(self._place(shard), offset, offset + size)
            return check_ids(np.frombuffer(content, FLAT_KEYS[found.key]), self.vocab_size)
        content = self._files.read(self._place(shard), offset - BLOCK, offset + size)
        if len(content) != BLOCK + size:
            raise ValueError(f"the file ends at byte {offset - BLOCK + len(content)}, inside the sample")
        name = check_header(content[:BLOCK], size, found.key)
        try:
            return check_ids(decode_member(content[BLOCK:], found.key), self.vocab_size)
        except ValueError as error:
            raise ValueError(f"member {name}: {error}") from None

    def _cropped(self, tokens: np.ndarray, position: int) -> np.ndarray:
        spare = len(tokens) - (self.seq_len + 1)
        if spare < 0:
            raise ValueError(f"{len(tokens)} ids, but seq_len {self.seq_len} needs {self.seq_len + 1}")
        if spare == 0:
            return tokens
        start = int(mix(np.array([position], np.uint64) ^ self._crop_key)[0] % np.uint64(spare + 1))
        return tokens[start : start + self.seq_len + 1]

    def _index_of(self, shard: Shard) -> ShardIndex:
        found = self._indexes.get(shard.url)
        if found is None:
            found = self._make_index(shard)
            self._indexes[shard.url] = found
            if len(self._indexes) > _KEPT_INDEXES:
                self._indexes.popitem(last=False)
        else:
            self._indexes.move_to_end(shard.url)
        return found

    def _make_index(self, shard: Shard) -> ShardIndex:
        self._check_size(shard)
        if shard.layout and shard.key and (self.data_key in ("auto", shard.key) or shard.key in FLAT_KEYS):
            return ShardIndex.regular(shard.key, list(shard.layout), shard.n_sequences)
        try:
            found = index_shard(self._place(shard), self.data_key)
        except DataError as error:
            raise ValueError(str(error)) from None
        if len(found) != shard.n_sequences:
            raise ValueError(_miscounted(shard, found))
        return found

    def _place(self, shard: Shard) -> str:
        """Where the shard is read: its url, or its copy in the cache."""
        if not self._cache or not storage.is_remote(shard.url):
            return shard.url
        return self._cache.local(shard.url)

    def fetch_ahead(self, source: np.ndarray, shard: np.ndarray) -> None:
        """Say which shards will be read soon."""
        if self._cache:
            places = dict.fromkeys(zip(source.tolist(), shard.tolist(), strict=True))
            urls = dict.fromkeys(self.shards[s][k].url for s, k in places)
            self._cache.fetch_ahead(url for url in urls if storage.is_remote(url) and self._is_news(url))

    def _is_news(self, url: str) -> bool:
        news = url not in self._announced
        self._announced[url] = None
        if len(self._announced) > _KEPT_INDEXES:
            self._announced.popitem(last=False)
        return news

    def _check_size(self, shard: Shard) -> None:
        if shard.size_bytes is None:
            return
        found = storage.size_bytes(self._place(shard))
        if found != shard.size_bytes:
            raise ValueError(
                f"the manifest says {shard.size_bytes} bytes, the file has {found}; make the manifest again"
            )


def _miscounted(shard: Shard, found: ShardIndex) -> str:
    return f"the manifest counts {shard.n_sequences} samples, the shard holds {len(found)}; make the manifest again"


class _Files:
    """Open local files and fetched blocks of remote ones, the least used given up first."""

    def __init__(self) -> None:
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._held_bytes = 0

    def read(self, url: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of `url`; fewer where it ends. ValueError when it cannot be opened."""
        if storage.is_remote(url):
            return self._read_remote(url, start, stop)
        descriptor = self._descriptors.get(url)
        if descriptor is None:
            try:
                descriptor = os.open(storage.local_path(url), os.O_RDONLY)
            except FileNotFoundError:
                raise
            except OSError as error:
                raise ValueError(f"cannot be opened ({error.strerror})") from None
            self._descriptors[url] = descriptor
            if len(self._descriptors) > _KEPT_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
        else:
            self._descriptors.move_to_end(url)
        return os.pread(descriptor, stop - start, start)

    def fetch(self, ranges: Sequence[tuple[str, int, int]]) -> None:
        """Get the blocks under `ranges`, several requests at a time."""
        missing = {
            (url, block): None
            for url, start, stop in ranges
            for block in range(start // _REMOTE_BLOCK, (stop - 1) // _REMOTE_BLOCK + 1)
            if (url, block) not in self._blocks
        }
        with ThreadPoolExecutor(min(16, max(1, len(missing)))) as pool:
            for name, content in zip(missing, pool.map(lambda name: self._get(*name), missing), strict=True):
                self._blocks[name] = content
                self._held_bytes += len(content)
        while self._held_bytes > _REMOTE_BYTES and len(self._blocks) > len(missing):
            self._held_bytes -= len(self._blocks.popitem(last=False)[1])

    def _get(self, url: str, block: int) -> bytes:
        return storage.read_range(url, block * _REMOTE_BLOCK, (block + 1) * _REMOTE_BLOCK)

    def _read_remote(self, url: str, start: int, stop: int) -> bytes:
        first, last = start // _REMOTE_BLOCK, (stop - 1) // _REMOTE_BLOCK
        if any((url, block) not in self._blocks for block in range(first, last + 1)):
            try:
                self.fetch([(url, start, stop)])
            except StorageError as error:
                raise ValueError(str(error)) from None
        content = b"".join(self._blocks[url, block] for block in range(first, last + 1))
        return content[start - first * _REMOTE_BLOCK : stop - first * _REMOTE_BLOCK]

    def __getstate__(self) -> dict[str, object]:
        return {}  # descriptors and blocks stay with the process that has them

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()  # type: ignore[misc]
