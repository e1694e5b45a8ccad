"""Samples from shards into a table of ids: read by offset, checked together; one that cannot be read has a reason."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from open_lm import storage
from open_lm.data.flat import FLAT_KEYS
from open_lm.data.formats import plain_npy_header
from open_lm.data.manifest import Shard
from open_lm.data.mixture import Plan
from open_lm.data.permutations import key, mix
from open_lm.data.rows import PROOF_BYTES, SampleRows, read_checksum, shard_ids
from open_lm.data.sample_check import checked_sample, header_place
from open_lm.data.shard_files import Files
from open_lm.data.shards import NPY_HEADER_BYTES, ShardIndex
from open_lm.data.tar import BLOCK, CHECKSUM_PLACE
from open_lm.errors import DataError, StorageError

_INDEX_BYTES = 256 << 20
_FOUR_DIGITS = np.frombuffer(b"".join(b"%04d" % k for k in range(10_000)), "<u4")
_NAME_END = np.frombuffer(b".npy", "<u4")[0]


class SampleReader:
    """Reads samples of `sample_tokens` ids from the shards of all sources.

    A longer sample is cropped at a hash of `seed` and its place in the stream. Ids are below `vocab_size`.
    """

    def __init__(
        self,
        shards: Sequence[Sequence[Shard]],
        *,
        files: Files,
        data_key: str,
        vocab_size: int,
        sample_tokens: int,
        seed: int = 0,
    ):
        self.shards = [shard for source in shards for shard in source]
        self._first_of = np.cumsum([0, *(len(source) for source in shards)])
        self.data_key, self.vocab_size, self.sample_tokens = data_key, vocab_size, sample_tokens
        self._files, self._seed = files, seed
        self._indexes, self._index_bytes = OrderedDict[int, ShardIndex](), 0
        self._table, self._regular = ByteTable(), RegularShards(self.shards)

    def numbers(self, source: np.ndarray, shard: np.ndarray) -> np.ndarray:
        """The shards' numbers among those of all sources."""
        return self._first_of[source] + shard

    def expected_checksum(self, source: np.ndarray, shard: np.ndarray, place: np.ndarray) -> int:
        """The expected `read_checksum` of these samples."""
        return read_checksum(self._regular.ids_of(self.numbers(source, shard)), place)

    def read(self, source: np.ndarray, shard: np.ndarray, place: np.ndarray, position: np.ndarray) -> SampleRows:
        """The samples (n, sample_tokens), and (row, reason) of those that cannot be read: their rows are -1."""
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

    @cached_property
    def _crop_key(self) -> np.uint64:
        return key("crop", self._seed)

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


class RegularShards:
    """Facts of shards by number, as arrays, so that a batch of samples of one form is recognised at once."""

    def __init__(self, shards: Sequence[Shard]):
        self._shards = shards
        self._kind_of = np.full(len(shards), -1, np.int32)
        self._kinds: list[tuple[str, tuple[int, int, int]]] = []
        self._ids, self._has_id = np.zeros(len(shards), np.uint64), np.zeros(len(shards), bool)
        self.first_numbers = np.full(len(shards), -1, np.int64)

    def note(self, number: int, index: ShardIndex) -> None:
        """Remember the layout of a shard whose samples are all alike."""
        first = self._shards[number].first_number
        self.first_numbers[number] = -1 if first is None else first
        if index.layout is not None:
            kind = (index.key, index.layout)
            if kind not in self._kinds:
                self._kinds.append(kind)
            self._kind_of[number] = self._kinds.index(kind)

    def common(self, which: np.ndarray) -> tuple[str, tuple[int, int, int]] | None:
        """Key and layout of all these shards, where they are known and the same."""
        kinds = self._kind_of[which]
        if not len(kinds) or kinds[0] < 0 or (kinds != kinds[0]).any():
            return None
        return self._kinds[int(kinds[0])]

    def ids_of(self, which: np.ndarray) -> np.ndarray:
        """64 bits that stand for each shard."""
        if not self._has_id[which].all():
            new = np.unique(which[~self._has_id[which]])
            self._ids[new] = shard_ids([self._shards[number].url for number in new.tolist()])
            self._has_id[new] = True
        return self._ids[which]


class ByteTable:
    """A table of bytes that is used for batch after batch, with a view of each row."""

    def __init__(self) -> None:
        self._whole = np.zeros((0, 0), np.uint8)
        self.views: list[memoryview] = []

    def of(self, n_rows: int, width: int) -> np.ndarray:
        """Its first `n_rows` rows of `width` bytes, each beginning at a multiple of 8."""
        stride = -(-width // 8) * 8
        if self._whole.shape[1] != stride or len(self._whole) < n_rows or len(self.views[0]) != width:
            self._whole = np.zeros((n_rows, stride), np.uint8)
            self.views = [memoryview(row)[:width] for row in self._whole]  # type: ignore[arg-type]
        return self._whole[:n_rows, :width]

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()  # type: ignore[misc]


class PlannedSamples:
    """Samples by position: the plan says which, the reader gets them."""

    def __init__(self, plan: Plan, reader: SampleReader):
        self.plan, self.reader = plan, reader
        self.sample_tokens = reader.sample_tokens
        self.reads_remote = any(storage.is_remote(shard.url) for shard in reader.shards)

    def __call__(self, positions: np.ndarray) -> SampleRows:
        found = self.plan.locate_step(positions)
        return self.reader.read(found.source, found.shard, found.place, positions)

    def expected_checksum(self, positions: np.ndarray) -> int:
        """The expected `read_checksum` of the samples at these positions."""
        return self.reader.expected_checksum(*self.plan.locate_step(positions))

    def describe(self, position: np.ndarray) -> str:
        """The sample at one position, for people."""
        found = self.plan.locate(position)
        shard = self.reader.shards[int(self.reader.numbers(found.source, found.shard)[0])]
        return f"shard {storage.shown(shard.url)}, sample {int(found.place[0])}"

    def fetch_ahead(self, positions: np.ndarray) -> None:
        """Have the blocks of these positions fetched in the background."""
        self.reader.fetch_ahead(*self.plan.locate(positions))


@dataclass(frozen=True)
class SyntheticSamples:
    """Random ids, a hash of seed and place: for measuring speed and trying settings without data."""

    vocab_size: int
    seq_len: int
    seed: int
    reads_remote = False

    @property
    def sample_tokens(self) -> int:
        return self.seq_len + 1

    def expected_checksum(self, positions: np.ndarray) -> int:
        """That of one shard, which nobody reads."""
        return read_checksum(shard_ids([""]), positions)

    def __call__(self, positions: np.ndarray) -> SampleRows:
        places = positions[:, None] * (self.seq_len + 1) + np.arange(self.seq_len + 1)
        hashes = mix(places.astype(np.uint64) ^ key("synthetic", self.seed))
        return SampleRows((hashes % np.uint64(self.vocab_size)).astype(np.int32), [], self.expected_checksum(positions))

    def stripe_of(self, positions: np.ndarray) -> np.ndarray:
        return positions

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros_like(positions), positions
