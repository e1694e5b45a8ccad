"""A shard: a tar of samples, indexed, read whole and written deterministically."""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, NamedTuple, cast

import numpy as np
import xxhash

from open_lm import storage
from open_lm.data.config import SAMPLE_FORMATS
from open_lm.data.formats import MAX_MEMBER_BYTES, SampleFormat, npy_header
from open_lm.data.marks import joined
from open_lm.data.tar import BLOCK, END, Bytes, extension, headers_for, name_of, padded, regular_members, walk
from open_lm.errors import DataError

NPY_HEADER_BYTES = 128


@dataclass(frozen=True)
class ShardIndex:
    """Places of the samples of one shard: `offsets` and `sizes` of their payloads in bytes; a header is before each.

    `header_sums` are the crc32 of these headers. Where all samples are alike, `layout` says all of this, and the three
    arrays are empty.
    """

    key: str
    n_sequences: int
    offsets: np.ndarray
    sizes: np.ndarray
    header_sums: np.ndarray
    layout: tuple[int, int, int] | None = None
    """[first offset, distance, size]: all that random access needs."""

    def __len__(self) -> int:
        return self.n_sequences

    @property
    def size_bytes(self) -> int:
        """The memory it takes."""
        return self.offsets.nbytes + self.sizes.nbytes + self.header_sums.nbytes

    def span(self, place: int) -> tuple[int, int]:
        """Offset and size of one sample's payload."""
        if self.layout:
            return self.layout[0] + self.layout[1] * place, self.layout[2]
        return int(self.offsets[place]), int(self.sizes[place])

    @classmethod
    def regular(cls, key: str, layout: tuple[int, int, int], n_sequences: int) -> ShardIndex:
        """The index of `n_sequences` samples that are all alike."""
        none = np.zeros(0, np.int64)
        return cls(key, n_sequences, none, none, none.astype(np.uint32), layout)


def read_index(content: Bytes, shard: str, key: str = "auto") -> ShardIndex:
    """The samples of a whole tar, from its headers alone.

    Raises:
        DataError: the tar is empty, cut off or damaged, or holds no member with extension `key`; `shard` is named.
    """
    members = walk(content, shard)
    if not members.names:
        raise DataError(f"shard {shard}: an empty tar. Write it again, or remove it from the manifest.")
    extensions = [extension(name) for name in members.names]
    key = _find_key(set(extensions), key, shard)
    mine = np.array([k for k, found in enumerate(extensions) if found == key], np.int64)
    offsets, sizes = np.array(members.offsets, np.int64)[mine], np.array(members.sizes, np.int64)[mine]
    sums = np.array(members.header_sums, np.uint32)[mine]
    return ShardIndex(key, len(mine), offsets, sizes, sums)


def layout_of(index: ShardIndex) -> tuple[int, int, int] | None:
    """[first offset, distance, size] when all samples are alike; None otherwise."""
    if index.layout or not len(index) or (index.sizes != index.sizes[0]).any():
        return index.layout
    steps = np.diff(index.offsets)
    if len(steps) and (steps != steps[0]).any():
        return None
    step = int(steps[0]) if len(steps) else padded(int(index.sizes[0])) + BLOCK
    return int(index.offsets[0]), step, int(index.sizes[0])


def _find_key(found: set[str], key: str, shard: str) -> str:
    known = sorted(found & set(SAMPLE_FORMATS))
    if key == "auto" and len(known) == 1:
        return known[0]
    if key == "auto" and known:
        raise DataError(f"shard {shard}: has members .{' and .'.join(known)}. Say which with --data-key.")
    if key in found:
        return key
    wanted = " or ".join(f".{name}" for name in SAMPLE_FORMATS) if key == "auto" else f".{key}"
    raise DataError(f"shard {shard}: no {wanted} members, found .{', .'.join(sorted(found)[:5])}. Check --data-key.")


def regular_index(read: Callable[[int, int], bytes], n_bytes: int) -> ShardIndex | None:
    """The index of a shard of equal npy samples, from its first and last headers; None for any other shard."""
    found = regular_members(read, n_bytes, "npy")
    return ShardIndex.regular("npy", (BLOCK, found[0], found[1]), found[2]) if found else None


def index_file(path: str, shard: str, key: str = "auto") -> ShardIndex:
    """The index of a shard that is a local file; a regular npy shard is not read for it.

    Raises:
        DataError: as `read_index`.
    """
    n_bytes = storage.size_bytes(path)
    if n_bytes == 0:
        raise DataError(f"shard {shard}: an empty file. Write it again, or remove it from the manifest.")
    with storage.open_read(path) as file:
        if key in ("auto", "npy"):
            quick = regular_index(lambda start, stop: os.pread(file.fileno(), stop - start, start), n_bytes)
            if quick:
                return quick
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return read_index(content, shard, key)


def sample_format(key: str) -> SampleFormat:
    """The encoding registered for the extension `key`."""
    return SAMPLE_FORMATS.load(key)


def decode_member(payload: bytes, key: str) -> np.ndarray:
    """The ids in one member's payload; ValueError says what is wrong with it."""
    if len(payload) > MAX_MEMBER_BYTES:
        raise ValueError(f"a member of {len(payload)} bytes; the limit is {MAX_MEMBER_BYTES}")
    return sample_format(key).decode(payload)


def checksum(payload: bytes | memoryview | np.ndarray, key: str) -> int:
    """The checksum of a payload that its header holds: xxh3, for an npy vector of its ids alone."""
    view = memoryview(cast(Any, payload))
    return xxhash.xxh3_64_intdigest(view[NPY_HEADER_BYTES:] if key == "npy" else view)


OUTSIDE = "is outside a vocabulary"


def check_ids(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """`tokens` with negative ids counted from the end of the vocabulary; ValueError when one is outside it.

    A sample with marks becomes ids and marks in one number each (data/marks.py).
    """
    if tokens.dtype.names:
        return joined(check_ids(tokens["ids"], vocab_size), tokens["marks"])
    low, high = (int(tokens.min()), int(tokens.max())) if tokens.size else (0, 0)
    if low < -vocab_size or high >= vocab_size:
        raise ValueError(f"token id {high if high >= vocab_size else low} {OUTSIDE} of {vocab_size}")
    return np.where(tokens < 0, tokens + vocab_size, tokens) if low < 0 else tokens


def read_samples(url: str, *, key: str = "auto", vocab_size: int | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """(member name, ids) of every sample of one shard, in order; marks are left out.

    Raises:
        DataError: the shard or a member is damaged, or an id is outside the vocabulary.
    """
    content = storage.read_bytes(url)
    index = read_index(content, storage.shown(url), key)
    for offset, size in zip(index.offsets.tolist(), index.sizes.tolist(), strict=True):
        name = name_of(content[offset - BLOCK : offset])
        try:
            tokens = decode_member(content[offset : offset + size], index.key)
            tokens = tokens["ids"] if tokens.dtype.names else tokens
            yield name, tokens if vocab_size is None else check_ids(tokens, vocab_size)
        except ValueError as error:
            raise DataError(f"shard {storage.shown(url)}, member {name}: {error}.") from None


def describe_shard(content: bytes, shard: str, key: str = "auto") -> dict[str, Any]:
    """The manifest's entry of one shard, all but its name, after the whole tar has been checked.

    Raises:
        DataError: the tar is empty, cut off or damaged; `shard` is named.
    """
    if not content:
        raise DataError(f"shard {shard}: an empty file. Write it again, or remove it.")
    index = read_index(content, shard, key)
    first, last = int(index.offsets[0]), int(index.offsets[-1])
    try:
        length = len(decode_member(content[first : first + int(index.sizes[0])], index.key))
    except ValueError as error:
        raise DataError(f"shard {shard}, member {name_of(content[first - BLOCK : first])}: {error}.") from None
    row = {
        "num_sequences": len(index),
        "bytes": len(content),
        "crc32": f"{zlib.crc32(content):08x}",
        "first_key": _sample_key(content[first - BLOCK : first], index.key),
        "last_key": _sample_key(content[last - BLOCK : last], index.key),
        "seq_len": length - 1,
        "data_key": index.key,
    }
    layout = layout_of(index)
    return row | ({"layout": list(layout)} if layout else {})


def _sample_key(header: bytes, key: str) -> str:
    return name_of(header).removesuffix("." + key)


class WrittenShard(NamedTuple):
    """Size and crc32 of a shard as it was written; `layout` as in `ShardIndex`, where that is known."""

    size_bytes: int
    crc32: int
    layout: tuple[int, int, int] | None


def write_shard(
    file: IO[bytes], samples: np.ndarray | Iterable[np.ndarray], key: str, first_number: int = 0
) -> WrittenShard:
    """Write samples (vectors of ids, of the dtype npy shall keep) as one tar.

    Members are named by 12-digit numbers from `first_number`; times and owners are 0, but for each sample's checksum in
    the place of its owner's name: equal samples give equal bytes.
    """
    size_bytes, crc, layout = 0, 0, None
    if key == "npy" and isinstance(samples, np.ndarray) and len(samples):
        members, step, size = _npy_members(samples, first_number)
        file.write(members)
        size_bytes, crc, layout = len(members), zlib.crc32(members), (BLOCK, step, size)
    else:
        encode = sample_format(key).encode
        for number, tokens in enumerate(samples, first_number):
            payload = encode(tokens)
            sums = np.array([checksum(payload, key)], np.uint64)
            header = headers_for(np.array([number]), len(payload), key, sums).tobytes()
            member = header + payload + bytes(-len(payload) % BLOCK)
            file.write(member)
            size_bytes, crc = size_bytes + len(member), zlib.crc32(member, crc)
    file.write(END)
    return WrittenShard(size_bytes + len(END), zlib.crc32(END, crc), layout)


def _npy_members(samples: np.ndarray, first_number: int) -> tuple[memoryview, int, int]:
    """All members of a shard of equal npy vectors, built as one table of bytes (10 times faster than one by one), with
    their distance and the size of a payload."""
    n, length = samples.shape
    head = np.frombuffer(npy_header(samples.dtype, length), np.uint8)
    size = len(head) + length * samples.dtype.itemsize
    rows = np.ascontiguousarray(samples).view(np.uint8).reshape(n, -1)
    sums = np.fromiter((xxhash.xxh3_64_intdigest(row.data) for row in rows), np.uint64, n)
    table = np.zeros((n, BLOCK + padded(size)), np.uint8)
    table[:, :BLOCK] = headers_for(np.arange(first_number, first_number + n), size, "npy", sums)
    table[:, BLOCK : BLOCK + len(head)] = head
    table[:, BLOCK + len(head) : BLOCK + size] = rows
    return table.reshape(-1).data, table.shape[1], size


def shard_name(url: str) -> str:
    """A shard's name as manifests spell it: the base name without `.tar`."""
    return os.path.basename(url).removesuffix(".tar")
