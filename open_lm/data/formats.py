"""Sample formats: the token ids of one sample as the bytes of a shard member, and back; one object per extension.

To add a format: an object with `encode` and `decode` here, its name in `open_lm.data.config.SAMPLE_FORMATS`.
"""

from __future__ import annotations

import array
import ast
import contextlib
import importlib
import struct
import zlib
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import orjson

from open_lm.data.marks import FIELDS

MAX_MEMBER_BYTES = 64 << 20
"""No sample is larger; what claims to be is damage or a bomb."""

_OLD_END_OF_TEXT = b"'<|endoftext|>'"


class SampleFormat(Protocol):
    """Both ways between a vector of ids and bytes. `decode` raises ValueError with what is wrong."""

    extension: str

    def encode(self, tokens: np.ndarray) -> bytes: ...

    def decode(self, payload: bytes) -> np.ndarray: ...


def _ids(payload: bytes) -> np.ndarray:
    """The ids of a JSON list. Strict: 1.0, "1" and true are not valid ids."""
    try:
        values = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not a JSON list of ids ({error})") from None
    if not isinstance(values, list):
        raise ValueError(f"holds a {type(values).__name__}, not a list of ids")
    try:
        if b"e" not in payload:  # of `true` and `false`, which array() would take for 1 and 0
            return np.frombuffer(array.array("q", values), np.int64)
    except (TypeError, OverflowError):
        pass
    for value in values:
        if type(value) is not int or abs(value) >= 2**62:
            raise ValueError(f"holds {value!r:.40}, which is no token id")
    return np.array(values, np.int64)


class _Json:
    extension = "json"

    def encode(self, tokens: np.ndarray) -> bytes:
        return orjson.dumps(tokens, option=orjson.OPT_SERIALIZE_NUMPY)

    def decode(self, payload: bytes) -> np.ndarray:
        return _ids(payload)


class _Txt:
    """A Python list in text, as OpenLM's make_2048 wrote it: there the quoted `'<|endoftext|>'` stands for id 0."""

    extension = "txt"

    def encode(self, tokens: np.ndarray) -> bytes:
        return orjson.dumps(tokens, option=orjson.OPT_SERIALIZE_NUMPY).replace(b",", b", ")

    def decode(self, payload: bytes) -> np.ndarray:
        plain = payload.replace(_OLD_END_OF_TEXT, b"0") if b"'" in payload else payload
        try:
            return _ids(plain)
        except ValueError:
            return _ids(orjson.dumps(_literal(plain), default=repr))


def _literal(payload: bytes) -> object:
    """A list that Python reads and JSON does not (a tuple, a trailing comma); ValueError for anything else."""
    try:
        value = ast.literal_eval(payload.decode())
    except (ValueError, SyntaxError, MemoryError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"not a list of ids ({type(error).__name__})") from None
    return list(value) if isinstance(value, tuple) else value


class _JsonGz:
    extension = "json.gz"

    def encode(self, tokens: np.ndarray) -> bytes:
        packer = zlib.compressobj(1, zlib.DEFLATED, 31)  # 31: with a gzip header, whose time is 0
        return packer.compress(JSON.encode(tokens)) + packer.flush()

    def decode(self, payload: bytes) -> np.ndarray:
        return _ids(_gunzip(payload))


def _gunzip(payload: bytes) -> bytes:
    """The content of one gzip member, checked to its end, never more than MAX_MEMBER_BYTES."""
    unpacker = _zlib.decompressobj(31)
    try:
        content = unpacker.decompress(payload, MAX_MEMBER_BYTES)
    except _zlib.error as error:
        raise ValueError(f"damaged gzip data ({error})") from None
    if not unpacker.eof:
        raise ValueError("gzip data that is cut off or too large")
    return content


_zlib: Any = zlib
with contextlib.suppress(ImportError):  # three times as fast
    _zlib = importlib.import_module("isal.isal_zlib")


class _Npy:
    """numpy's own file format: one vector of integers, uint16 where the ids fit, or of the two fields of marks.py."""

    extension = "npy"

    def encode(self, tokens: np.ndarray) -> bytes:
        return npy_header(tokens.dtype, len(tokens)) + np.ascontiguousarray(tokens).tobytes()

    def decode(self, payload: bytes) -> np.ndarray:
        dtype, length, start = _read_npy_header(payload[:256])
        if len(payload) != start + dtype.itemsize * length:
            raise ValueError(f"npy data of {len(payload) - start} bytes, its header says {dtype.itemsize * length}")
        return np.frombuffer(payload, dtype, length, start)


@lru_cache(maxsize=64)
def npy_header(dtype: np.dtype, length: int) -> bytes:
    """The header of a .npy file that holds one vector."""
    described = np.lib.format.dtype_to_descr(dtype)
    text = f"{{'descr': {described!r}, 'fortran_order': False, 'shape': ({length},), }}".encode()
    padding = -(10 + len(text) + 1) % 64
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + padding + 1) + text + b" " * padding + b"\n"


_headers: dict[bytes, tuple[np.dtype, int, int]] = {}


def _read_npy_header(head: bytes) -> tuple[np.dtype, int, int]:
    """dtype, length and offset of the data; headers seen before are not parsed again."""
    known = _headers.get(head[:128])
    if known:
        return known
    if head[:6] != b"\x93NUMPY" or len(head) < 12:
        raise ValueError("no npy data")
    major, size_bytes = head[6], 2 if head[6] == 1 else 4
    start = 8 + size_bytes + int.from_bytes(head[8 : 8 + size_bytes], "little")
    try:
        described = ast.literal_eval(head[8 + size_bytes : start].decode("latin1"))
        dtype, shape = np.dtype(described["descr"]), described["shape"]
    except (ValueError, SyntaxError, KeyError, TypeError):
        raise ValueError(f"an npy header (version {major}) that cannot be read") from None
    if (dtype.kind not in "iu" and dtype.names != FIELDS) or len(shape) != 1:
        raise ValueError(f"an npy array of {dtype} and shape {shape}, not a vector of integers")
    if start == 128 and len(_headers) < 1000:
        _headers[bytes(head[:128])] = dtype, shape[0], start
    return dtype, shape[0], start


class PlainNpy(NamedTuple):
    """The npy header, of 128 bytes, of a vector of plain integers."""

    dtype: np.dtype
    length: int


def plain_npy_header(head: bytes, n_bytes: int) -> PlainNpy | None:
    """The content of a whole header of 128 bytes, when header and ids together are `n_bytes`; None otherwise."""
    try:
        dtype, length, start = _read_npy_header(head)
    except ValueError:
        return None
    plain = dtype.kind in "iu" and start == 128 and start + dtype.itemsize * length == n_bytes
    return PlainNpy(dtype, length) if plain else None


NPY, TXT, JSON, JSON_GZ = _Npy(), _Txt(), _Json(), _JsonGz()


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 65536 else "<u4")
