"""The tar format: where members lie, checked headers, and headers written deterministically. No other file knows it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from open_lm.errors import DataError

BLOCK = 512
END = bytes(2 * BLOCK)
CHECKSUM_PLACE = 265
"""Offset of a sample's checksum in its header, in the owner's name: `x3:` and 16 hexadecimal digits."""
CHECKSUM_MARK = b"x3:"
MAX_EXTENDED_BYTES = 1 << 20
"""No long name or pax record is larger; what claims to be is damage."""


class Bytes(Protocol):
    """A file's content by place: bytes, mmap, or anything sliced like them."""

    def __getitem__(self, place: slice, /) -> bytes: ...
    def __len__(self) -> int: ...


class Members(NamedTuple):
    """The regular files of a tar: names, where their content begins, its size, and crc32 of the header before it."""

    names: list[str]
    offsets: list[int]
    sizes: list[int]
    header_sums: list[int]


def walk(content: Bytes, shard: str) -> Members:
    """All regular members, by following sizes from header to header.

    Raises:
        DataError: the tar is cut off or damaged; `shard` is named.
    """
    found = Members([], [], [], [])
    headers: list[bytes] = []
    position, total, long_name, pax = 0, len(content), None, {}
    while True:
        header = bytes(content[position : position + BLOCK])
        if len(header) < BLOCK:
            raise DataError(
                f"shard {shard}: cut off at byte {total}, after {len(found.names)} members. Copy or write it again."
            )
        if header[0] == 0 and not any(header):
            _check_end(content, position, shard)
            _check_headers(headers, found.offsets, shard)
            return found
        size, kind = number(header[124:136], shard, position), header[156:157]
        start = position + BLOCK
        if kind in b"LxgK":
            payload = bytes(content[start : start + min(size, MAX_EXTENDED_BYTES)])
            if kind == b"L":
                long_name = payload.rstrip(b"\0").decode(errors="replace")
            elif kind == b"x":
                pax = _pax(payload)
        else:
            size = _pax_size(pax, size, shard, position)
            if kind in b"0\0" or kind == b"7":
                headers.append(header)
                found.names.append(pax.get("path") or long_name or name_of(header))
                found.offsets.append(start)
                found.sizes.append(size)
                found.header_sums.append(zlib.crc32(header))
            long_name, pax = None, {}
        position = start + padded(size)
        if start + size > total:
            raise DataError(
                f"shard {shard}: cut off at byte {total}, inside member {name_of(header)!r:.120} "
                f"that ends at byte {start + size}. Copy or write it again."
            )


def _pax_size(pax: dict[str, str], size: int, shard: str, position: int) -> int:
    text = pax.get("size")
    if text is None:
        return size
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise DataError(f"shard {shard}: a size of {text!r:.40} at byte {position}. Copy or write it again.")
    return int(text)


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
        if found != number(header[148:156], shard, offsets[k] - BLOCK):
            raise DataError(
                f"shard {shard}: the tar header at byte {offsets[k] - BLOCK} is damaged (checksum). Copy it again."
            )


def number(text: bytes, shard: str, position: int) -> int:
    """A number field: octal digits, or GNU's binary form for large ones; never negative."""
    if text[0] == 0x80:
        return int.from_bytes(text[1:], "big")
    digits = text.strip(b" \0") or b"0"
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise DataError(f"shard {shard}: no tar header at byte {position}. Is it a tar? Copy or write it again.")
    return int(digits, 8)


def name_of(header: bytes) -> str:
    """The name in a header itself; a longer one stands in a record before it."""
    name, prefix = header[:100].rstrip(b"\0"), header[345:500].rstrip(b"\0")
    in_parts = header[257:263] == b"ustar\0" and prefix
    return (prefix + b"/" + name if in_parts else name).decode(errors="replace")


def _pax(payload: bytes) -> dict[str, str]:
    records: dict[str, str] = {}
    while payload:
        length, _, _ = payload.partition(b" ")
        if not length.isdigit() or len(length) > 9 or int(length) <= len(length) + 1:
            break
        keyword, _, value = payload[len(length) + 1 : int(length) - 1].partition(b"=")
        records[keyword.decode(errors="replace")] = value.decode(errors="replace")
        payload = payload[int(length) :]
    return records


def padded(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def extension(name: str) -> str:
    """The extension of a member, from the first dot of its base name: `json.gz` of `a/b.json.gz`, as in webdataset."""
    return name.rpartition("/")[2].partition(".")[2]


def check_header(header: bytes, size: int, key: str) -> str:
    """The member's name, when `header` is that of a payload of `size` bytes with extension `key`; else ValueError.

    A name of 100 characters may go on in a record before the header.
    """
    name = name_of(header)
    is_cut = header[99:100] != b"\0"
    if header[124:136].strip(b" \0") != b"%011o" % size or not (name.endswith("." + key) or is_cut):
        raise ValueError(f"found member {name!r:.80} where one of {size} bytes with extension .{key} should be")
    return name


def regular_members(read: Callable[[int, int], bytes], n_bytes: int, key: str) -> tuple[int, int, int] | None:
    """(distance, size, number) of members that are all alike, from the first and last headers; None for any other tar.

    `read(start, stop)` gives bytes of the file. A reader checks each header when it comes to it.
    """
    first = read(0, BLOCK)
    if len(first) < BLOCK or first[156:157] not in b"0\0" or extension(name_of(first)) != key:
        return None
    try:
        size = number(first[124:136], "", 0)
        step = BLOCK + padded(size)
        n = (n_bytes - 1) // step + 1
        while n > 0 and (n * step + len(END) > n_bytes or not any(read((n - 1) * step, (n - 1) * step + BLOCK))):
            n -= 1
        end = read(n * step, n * step + len(END))
        check_header(read((n - 1) * step, (n - 1) * step + BLOCK), size, key)
    except (DataError, ValueError):
        return None
    return (step, size, n) if n > 0 and end == END else None


def headers_for(numbers: np.ndarray, size: int, key: str, checksums: np.ndarray) -> np.ndarray:
    """The tar headers (n, 512) of members named by 12-digit `numbers`, each of `size` bytes, with their checksums."""
    header = np.zeros(BLOCK, np.uint8)
    for place, text in (
        (12, b"." + key.encode()),
        (100, b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % size + b"%011o\0" % 0 + b" " * 8 + b"0"),
        (257, b"ustar\x0000"),
        (CHECKSUM_PLACE, CHECKSUM_MARK),
    ):
        header[place : place + len(text)] = np.frombuffer(text, np.uint8)
    headers = np.repeat(header[None], len(numbers), axis=0)
    for digit in range(12):
        headers[:, 11 - digit] = numbers // 10**digit % 10 + ord("0")
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    for digit in range(16):
        nibble = (checksums >> np.uint64(60 - 4 * digit)) & np.uint64(15)
        headers[:, CHECKSUM_PLACE + len(CHECKSUM_MARK) + digit] = digits[nibble.astype(np.int64)]
    sums = headers.sum(axis=1, dtype=np.int64)
    for digit in range(6):
        headers[:, 153 - digit] = (sums >> (3 * digit)) % 8 + ord("0")
    headers[:, 154], headers[:, 155] = 0, ord(" ")
    return headers


def stored_checksum(header: bytes) -> int | None:
    """The checksum of its content that a header holds; None where there is none."""
    text = header[CHECKSUM_PLACE : CHECKSUM_PLACE + len(CHECKSUM_MARK) + 16]
    if not text.startswith(CHECKSUM_MARK):
        return None
    try:
        return int(text[len(CHECKSUM_MARK) :], 16)
    except ValueError:
        return None
