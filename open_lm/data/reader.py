"""Samples from shards into a table of ids: read by offset, checked together; one that cannot be read has a reason."""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from open_lm import storage
from open_lm.data.cache import BLOCK_BYTES, BlockCache
from open_lm.data.flat import FLAT_KEYS
from open_lm.data.formats import plain_npy_header
from open_lm.data.manifest import Shard
from open_lm.data.permutations import key, mix
from open_lm.data.regular_shards import ByteTable, RegularShards
from open_lm.data.rows import PROOF_BYTES, SampleRows, read_checksum
from open_lm.data.sample_check import checked_sample, header_place
from open_lm.data.shards import NPY_HEADER_BYTES, ShardIndex, index_file
from open_lm.data.tar import BLOCK, CHECKSUM_PLACE
from open_lm.errors import DataError, StorageError

_INDEX_BYTES = 256 << 20
_FOUR_DIGITS = np.frombuffer(b"".join(b"%04d" % k for k in range(10_000)), "<u4")
_NAME_END = np.frombuffer(b".npy", "<u4")[0]


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
        cache: BlockCache | None = None,
    ):
        self.shards = [shard for source in shards for shard in source]
        self._first_of = np.cumsum([0, *(len(source) for source in shards)])
        self.data_key, self.vocab_size, self.sample_tokens = data_key, vocab_size, seq_len + 1
        self._crop_key = key("crop", seed)
        self._files: Files = _CachedFiles(cache) if cache else _LocalFiles()
        self._indexes, self._index_bytes = OrderedDict[int, ShardIndex](), 0
        self._table, self._regular = ByteTable(), RegularShards(self.shards)

    def numbers(self, source: np.ndarray, shard: np.ndarray) -> np.ndarray:
        """The shards' numbers among those of all sources."""
        return self._first_of[source] + shard

    def expected_checksum(self, source: np.ndarray, shard: np.ndarray, place: np.ndarray) -> int:
        """The expected `read_checksum` of these samples."""
        return read_checksum(self._regular.ids_of(self.numbers(source, shard)), place)

    def read(self, source: np.ndarray, shard: np.ndarray, place: np.ndarray, position: np.ndarray) -> SampleRows:
        """The samples (n, seq_len + 1), and (row, reason) of those that cannot be read: their rows are -1."""
        which, n = self.numbers(source, shard), len(place)
        numbers = which.tolist()
        indexes: list[ShardIndex | str] = []
        kind = self._regular.common(which)
        if kind is None:
            indexes = [self._index_or_reason(number) for number in numbers]
            kind = self._regular.common(which)
        if kind is not None:
            key, layout = kind
            self._files.prepare([self.shards[k] for k in numbers], layout[0] + layout[1] * place, layout[2])
            rows = self._read_alike(which, numbers, place, key, layout)
            if rows is not None:
                return rows
            indexes = [self._index_or_reason(number) for number in numbers]
        tokens = np.full((n, self.sample_tokens), -1, np.int32)
        unreadable = []
        self._prepare_each(numbers, place, indexes)
        for row, (number, at, index) in enumerate(zip(numbers, place.tolist(), indexes, strict=True)):
            try:
                tokens[row] = self._sample(number, at, index, int(position[row]))
            except (ValueError, OSError, StorageError, DataError) as error:
                reason = str(error).removesuffix(".")
                unreadable.append((row, f"shard {storage.shown(self.shards[number].url)}, sample {at}: {reason}."))
        return SampleRows(tokens, unreadable, read_checksum(self._regular.ids_of(which), place))

    def _read_alike(
        self, which: np.ndarray, numbers: list[int], place: np.ndarray, key: str, layout: tuple[int, int, int]
    ) -> SampleRows | None:
        """As `read`, where all samples are alike: one table of bytes, checked as a whole. None when something is not
        as it should be: then each sample is looked at alone."""
        first, step, size = layout
        head = 0 if key in FLAT_KEYS else BLOCK
        raw = self._table.of(len(place), head + size)
        starts = (first - head + step * place).tolist()
        read_into, shards, wanted = self._files.read_into, self.shards, head + size
        try:
            for number, start, view in zip(numbers, starts, self._table.views, strict=False):
                if read_into(shards[number], number, start, view) != wanted:
                    return None
        except (OSError, StorageError, DataError):
            return None
        if head:
            return self._npy_rows(raw, which, place, size) if key == "npy" else None
        ids = raw.view(FLAT_KEYS[key])
        fits = ids.shape[1] == self.sample_tokens and int(ids.max()) < self.vocab_size
        return SampleRows(ids, [], read_checksum(self._regular.ids_of(which), place)) if fits else None

    def _npy_rows(self, raw: np.ndarray, which: np.ndarray, place: np.ndarray, size: int) -> SampleRows | None:
        plain = plain_npy_header(raw[0, BLOCK : BLOCK + NPY_HEADER_BYTES].tobytes(), size)
        if plain is None or plain.length != self.sample_tokens:
            return None
        headers = raw[:, BLOCK : BLOCK + NPY_HEADER_BYTES].view(np.uint64)
        sizes = raw[:, 124:135]
        found = self._places(raw, which, place)
        if found is None or (headers != headers[0]).any() or (sizes != np.frombuffer(b"%011o" % size, np.uint8)).any():
            return None
        ids = raw[:, BLOCK + NPY_HEADER_BYTES :].view(plain.dtype)
        if int(ids.max()) >= self.vocab_size or (plain.dtype.kind == "i" and int(ids.min()) < 0):
            return None
        stored = raw[:, CHECKSUM_PLACE : CHECKSUM_PLACE + PROOF_BYTES].copy()
        widths = np.full(len(ids), plain.dtype.itemsize, np.uint8)
        return SampleRows(ids, [], read_checksum(self._regular.ids_of(which), found), stored, widths)

    def _places(self, raw: np.ndarray, which: np.ndarray, place: np.ndarray) -> np.ndarray | None:
        """The places of the samples in their shards, by the numbers in their names; None when one is not as asked."""
        first = self._regular.first_numbers[which]
        if (first < 0).any():
            known = all(header_place(raw[row, :BLOCK].tobytes(), "npy") for row in range(len(raw)))
            return place if known else None
        numbers, names = first + place, raw[:, :16].view("<u4")
        same = (names[:, 2] == _FOUR_DIGITS[numbers % 10_000]).all() and (names[:, 3] == _NAME_END).all()
        same = same and (names[:, 1] == _FOUR_DIGITS[numbers // 10_000 % 10_000]).all() and not raw[:, 16].any()
        same = same and (names[:, 0] == _FOUR_DIGITS[numbers // 100_000_000 % 10_000]).all()
        return place if same else None  # so it is what the names say

    def _sample(self, number: int, at: int, index: ShardIndex | str, position: int) -> np.ndarray:
        """One sample; an error that says why it cannot be had."""
        if isinstance(index, str):
            raise ValueError(index)
        shard = self.shards[number]
        if not 0 <= at < len(index):
            raise ValueError(_miscounted(shard, index))
        offset, size = index.span(at)
        head = 0 if index.key in FLAT_KEYS else BLOCK
        content = bytearray(head + size)
        n_read = self._files.read_into(shard, number, offset - head, memoryview(content))
        if n_read != head + size:
            raise ValueError(f"the file ends at byte {offset - head + n_read}, inside the sample")
        tokens = checked_sample(bytes(content), shard, index, at, self.vocab_size)
        return self._cropped(tokens, position)

    def _cropped(self, tokens: np.ndarray, position: int) -> np.ndarray:
        spare = len(tokens) - self.sample_tokens
        if spare < 0:
            raise ValueError(f"{len(tokens)} ids, but seq_len {self.sample_tokens - 1} needs {self.sample_tokens}")
        if spare == 0:
            return tokens
        start = int(mix(np.array([position], np.uint64) ^ self._crop_key)[0] % np.uint64(spare + 1))
        return tokens[start : start + self.sample_tokens]

    def _index_or_reason(self, number: int) -> ShardIndex | str:
        found = self._indexes.get(number)
        if found is not None:
            return found
        try:
            found = self._make_index(self.shards[number], number)
        except (ValueError, OSError, StorageError, DataError) as error:
            return str(error).removesuffix(".")
        self._regular.note(number, found)
        self._indexes[number] = found
        self._index_bytes += found.size_bytes + 200
        while self._index_bytes > _INDEX_BYTES:
            self._index_bytes -= self._indexes.popitem(last=False)[1].size_bytes + 200
        return found

    def _make_index(self, shard: Shard, number: int) -> ShardIndex:
        self._files.check(shard)
        if shard.layout and shard.key and (self.data_key in ("auto", shard.key) or shard.key in FLAT_KEYS):
            return ShardIndex.regular(shard.key, shard.layout, shard.n_sequences)
        found = self._files.index(shard, self.data_key)
        if len(found) != shard.n_sequences:
            raise ValueError(_miscounted(shard, found))
        return found

    def _prepare_each(self, numbers: list[int], place: np.ndarray, indexes: Sequence[ShardIndex | str]) -> None:
        wanted = [
            (self.shards[number], *index.span(at))
            for number, at, index in zip(numbers, place.tolist(), indexes, strict=True)
            if isinstance(index, ShardIndex) and 0 <= at < len(index)
        ]
        if wanted:
            shards, offsets, sizes = zip(*wanted, strict=True)
            self._files.prepare(list(shards), np.array(offsets), max(sizes))

    def fetch_ahead(self, source: np.ndarray, shard: np.ndarray, place: np.ndarray) -> None:
        """Begin to fetch what will be read soon."""
        for number, at in zip(self.numbers(source, shard).tolist(), place.tolist(), strict=True):
            one = self.shards[number]
            if one.layout and storage.is_remote(one.url):
                offset = one.layout[0] + one.layout[1] * at
                self._files.fetch_ahead(one, offset, one.layout[2])


def _miscounted(shard: Shard, found: ShardIndex) -> str:
    return f"the manifest counts {shard.n_sequences} samples, the shard holds {len(found)}; make the manifest again"


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
