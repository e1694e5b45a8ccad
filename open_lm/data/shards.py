"""Tar shards: samples read by offset and written deterministically. The only file that knows tar's layout."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, Protocol

import numpy as np

from open_lm import storage
from open_lm.data.config import SAMPLE_FORMATS
from open_lm.data.formats import MAX_MEMBER_BYTES, SampleFormat, npy_header
from open_lm.data.marks import joined
from open_lm.errors import DataError

BLOCK = 512
END = bytes(2 * BLOCK)


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of one shard lie: `offsets` and `sizes` of their payloads in bytes; a header is before each."""

    key: str
    offsets: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def layout(self) -> list[int] | None:
        """[first offset, distance, size] when all samples are alike: all that random access needs. None otherwise."""
        if not len(self) or (self.sizes != self.sizes[0]).any():
            return None
        steps = np.diff(self.offsets)
        if len(steps) and (steps != steps[0]).any():
            return None
        step = int(steps[0]) if len(steps) else _padded(int(self.sizes[0])) + BLOCK
        return [int(self.offsets[0]), step, int(self.sizes[0])]

    @classmethod
    def regular(cls, key: str, layout: list[int], n_sequences: int) -> ShardIndex:
        """The index of `n_sequences` samples that are all alike."""
        first, step, size = layout
        return cls(key, first + step * np.arange(n_sequences, dtype=np.int64), np.full(n_sequences, size, np.int64))


class Bytes(Protocol):
    """A file's content by place: bytes, mmap, or anything sliced like them."""

    def __getitem__(self, place: slice, /) -> bytes: ...
    def __len__(self) -> int: ...


def read_index(content: Bytes, shard: str, key: str = "auto") -> ShardIndex:
    """The samples of a whole tar, from its headers alone.

    Raises:
        DataError: the tar is empty, cut off or damaged, or holds no member with extension `key`; `shard` is named.
    """
    headers, names, offsets, sizes = _walk(content, shard)
    _check_headers(headers, offsets, shard)
    if not names:
        raise DataError(f"shard {shard}: an empty tar. Write it again, or remove it from the manifest.")
    extensions = [extension(name) for name in names]
    key = _find_key(set(extensions), key, shard)
    mine = np.array([k for k, found in enumerate(extensions) if found == key], np.int64)
    return ShardIndex(key, np.array(offsets, np.int64)[mine], np.array(sizes, np.int64)[mine])


def extension(name: str) -> str:
    """What follows the first dot of a member's base name: `json.gz` of `a/b.json.gz`, as webdataset splits names."""
    return name.rpartition("/")[2].partition(".")[2]


def _walk(content: Bytes, shard: str) -> tuple[list[bytes], list[str], list[int], list[int]]:
    """Headers, names, payload offsets and sizes of the regular members, by following sizes from header to header."""
    headers: list[bytes] = []
    names: list[str] = []
    offsets: list[int] = []
    sizes: list[int] = []
    position, total, long_name, pax = 0, len(content), None, {}
    while True:
        header = content[position : position + BLOCK]
        if len(header) < BLOCK:
            raise DataError(
                f"shard {shard}: cut off at byte {total}, after {len(names)} members. Copy or write it again."
            )
        if header[0] == 0 and not any(header):
            _check_end(content, position, shard)
            return headers, names, offsets, sizes
        size, kind = _number(header[124:136], shard, position), header[156:157]
        start = position + BLOCK
        if kind in b"Lxg":
            payload = bytes(content[start : start + min(size, 1 << 20)])
            if kind == b"L":
                long_name = payload.rstrip(b"\0").decode(errors="replace")
            elif kind == b"x":
                pax = _pax(payload)
        else:
            size = int(pax.get("size", size))
            if kind in b"0\0" or kind == b"7":
                headers.append(header)
                names.append(pax.get("path") or long_name or _name(header))
                offsets.append(start)
                sizes.append(size)
            long_name, pax = None, {}
        position = start + _padded(size)
        if start + size > total:
            raise DataError(
                f"shard {shard}: cut off at byte {total}, inside member {_name(header)!r} "
                f"that ends at byte {start + size}. Copy or write it again."
            )


def _check_end(content: Bytes, position: int, shard: str) -> None:
    """A tar ends with two empty blocks; a header after one empty block is a hole in the file."""
    for place in range(position + BLOCK, len(content), 1 << 20):
        block = content[place : place + (1 << 20)]
        if block.count(0) != len(block):
            raise DataError(f"shard {shard}: a hole at byte {position} with data behind it. Copy or write it again.")
    if len(content) < position + 2 * BLOCK:
        raise DataError(f"shard {shard}: cut off at byte {len(content)}: no end mark. Copy or write it again.")


def _check_headers(headers: list[bytes], offsets: list[int], shard: str) -> None:
    if not headers:
        return
    table = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, BLOCK)
    sums = table.sum(axis=1, dtype=np.int64) - table[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
    for k, (found, header) in enumerate(zip(sums.tolist(), headers, strict=True)):
        if found != _number(header[148:156], shard, offsets[k] - BLOCK):
            raise DataError(
                f"shard {shard}: the tar header at byte {offsets[k] - BLOCK} is damaged (checksum). Copy it again."
            )


def _number(text: bytes, shard: str, position: int) -> int:
    if text[0] & 0x80:
        return int.from_bytes(text, "big") & ((1 << (8 * len(text) - 1)) - 1)
    try:
        return int(text.strip(b" \0") or b"0", 8)
    except ValueError:
        raise DataError(
            f"shard {shard}: no tar header at byte {position}. Is it a tar? Copy or write it again."
        ) from None


def _name(header: bytes) -> str:
    name, prefix = header[:100].rstrip(b"\0"), header[345:500].rstrip(b"\0")
    in_parts = header[257:263] == b"ustar\0" and prefix
    return (prefix + b"/" + name if in_parts else name).decode(errors="replace")


def _pax(payload: bytes) -> dict[str, str]:
    records: dict[str, str] = {}
    while payload:
        length, _, _ = payload.partition(b" ")
        if not length.isdigit() or int(length) <= len(length) + 1:
            break
        keyword, _, value = payload[len(length) + 1 : int(length) - 1].partition(b"=")
        records[keyword.decode(errors="replace")] = value.decode(errors="replace")
        payload = payload[int(length) :]
    return records


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


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
    """The index of a shard of equal npy samples, from its first and last headers; None for any other shard.

    `read(start, stop)` gives bytes of the file. A reader checks each header when it comes to it.
    """
    first = read(0, BLOCK)
    if len(first) < BLOCK or first[156:157] not in b"0\0" or extension(_name(first)) != "npy":
        return None
    try:
        size = _number(first[124:136], "", 0)
        step = BLOCK + _padded(size)
        n = (n_bytes - 1) // step + 1
        while n > 0 and (n * step + len(END) > n_bytes or not any(read((n - 1) * step, (n - 1) * step + BLOCK))):
            n -= 1
        end = read(n * step, n * step + len(END))
        check_header(read((n - 1) * step, (n - 1) * step + BLOCK), size, "npy")
    except (DataError, ValueError):
        return None
    return ShardIndex.regular("npy", [BLOCK, step, size], n) if n > 0 and end == END else None


def check_header(header: bytes, size: int, key: str) -> str:
    """The member's name, when `header` is that of a payload of `size` bytes with extension `key`; else ValueError."""
    name = _name(header)
    if header[124:136].strip(b" \0") != b"%011o" % size or not name.endswith("." + key):
        raise ValueError(f"found member {name!r:.80} where one of {size} bytes with extension .{key} should be")
    return name


def sample_format(key: str) -> SampleFormat:
    """The encoding registered for the extension `key`."""
    return SAMPLE_FORMATS.load(key)


def decode_member(payload: bytes, key: str) -> np.ndarray:
    """The ids in one member's payload; ValueError says what is wrong with it."""
    if len(payload) > MAX_MEMBER_BYTES:
        raise ValueError(f"a member of {len(payload)} bytes; the limit is {MAX_MEMBER_BYTES}")
    return sample_format(key).decode(payload)


def check_ids(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """`tokens` with negative ids counted from the end of the vocabulary; ValueError when one is outside it.

    A sample with marks becomes ids and marks in one number each (data/marks.py).
    """
    if tokens.dtype.names:
        return joined(check_ids(tokens["ids"], vocab_size), tokens["marks"])
    low, high = (int(tokens.min()), int(tokens.max())) if tokens.size else (0, 0)
    if low < -vocab_size or high >= vocab_size:
        raise ValueError(f"token id {high if high >= vocab_size else low} is outside a vocabulary of {vocab_size}")
    return np.where(tokens < 0, tokens + vocab_size, tokens) if low < 0 else tokens


def read_samples(url: str, *, key: str = "auto", vocab_size: int | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """(member name, ids) of every sample of one shard, in order; marks are left out.

    Raises:
        DataError: the shard or a member is damaged, or an id is outside the vocabulary.
    """
    content = storage.read_bytes(url)
    index = read_index(content, storage.shown(url), key)
    for offset, size in zip(index.offsets.tolist(), index.sizes.tolist(), strict=True):
        name = _name(content[offset - BLOCK : offset])
        try:
            tokens = decode_member(content[offset : offset + size], index.key)
            tokens = tokens["ids"] if tokens.dtype.names else tokens
            yield name, tokens if vocab_size is None else check_ids(tokens, vocab_size)
        except ValueError as error:
            raise DataError(f"shard {storage.shown(url)}, member {name}: {error}.") from None


def describe_shard(content: bytes, shard: str, key: str = "auto") -> dict[str, Any]:
    """What a manifest says about one shard, all but its name, after the whole tar has been checked.

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
        raise DataError(f"shard {shard}, member {_name(content[first - BLOCK : first])}: {error}.") from None
    row = {
        "num_sequences": len(index),
        "bytes": len(content),
        "crc32": f"{zlib.crc32(content):08x}",
        "first_key": _sample_key(content[first - BLOCK : first], index.key),
        "last_key": _sample_key(content[last - BLOCK : last], index.key),
        "seq_len": length - 1,
        "data_key": index.key,
    }
    return row | ({"layout": index.layout} if index.layout else {})


def _sample_key(header: bytes, key: str) -> str:
    return _name(header).removesuffix("." + key)


def write_shard(file: IO[bytes], samples: np.ndarray | Iterable[np.ndarray], key: str, first_number: int = 0) -> int:
    """Write samples (vectors of ids, of the dtype npy shall keep) as one tar; the bytes written.

    Members are named by 12-digit numbers from `first_number`; times and owners are 0: equal samples give equal bytes.
    """
    if key == "npy" and isinstance(samples, np.ndarray):
        written = file.write(_npy_members(samples, first_number).data) if len(samples) else 0
    else:
        written = 0
        encode = sample_format(key).encode
        for number, tokens in enumerate(samples, first_number):
            payload = encode(tokens)
            header = _headers_for(np.array([number]), len(payload), key).tobytes()
            written += file.write(header + payload + bytes(-len(payload) % BLOCK))
    return written + file.write(END)


def _npy_members(samples: np.ndarray, first_number: int) -> np.ndarray:
    """All members of a shard of equal npy vectors, built as one table of bytes: 10 times faster than one by one."""
    n, length = samples.shape
    head = np.frombuffer(npy_header(samples.dtype, length), np.uint8)
    size = len(head) + length * samples.dtype.itemsize
    table = np.zeros((n, BLOCK + _padded(size)), np.uint8)
    table[:, :BLOCK] = _headers_for(np.arange(first_number, first_number + n), size, "npy")
    table[:, BLOCK : BLOCK + len(head)] = head
    table[:, BLOCK + len(head) : BLOCK + size] = np.ascontiguousarray(samples).view(np.uint8).reshape(n, -1)
    return table


def _headers_for(numbers: np.ndarray, size: int, key: str) -> np.ndarray:
    """The tar headers (n, 512) of members `numbers`, each of `size` bytes."""
    header = np.zeros(BLOCK, np.uint8)
    for place, text in (
        (12, b"." + key.encode()),
        (100, b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % size + b"%011o\0" % 0 + b" " * 8 + b"0"),
        (257, b"ustar\x0000"),
    ):
        header[place : place + len(text)] = np.frombuffer(text, np.uint8)
    headers = np.repeat(header[None], len(numbers), axis=0)
    for digit in range(12):
        headers[:, 11 - digit] = numbers // 10**digit % 10 + ord("0")
    sums = headers.sum(axis=1, dtype=np.int64)
    for digit in range(6):
        headers[:, 153 - digit] = (sums >> (3 * digit)) % 8 + ord("0")
    headers[:, 154], headers[:, 155] = 0, ord(" ")
    return headers


def shard_name(url: str) -> str:
    """A shard's name as manifests spell it: the base name without `.tar`."""
    return os.path.basename(url).removesuffix(".tar")
