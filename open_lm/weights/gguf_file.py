"""GGUF: the file format of llama.cpp, version 3, written tensor by tensor and read back.

A header of metadata and tensor descriptions, then the data, each tensor at a multiple of ALIGNMENT bytes.
Shapes here are torch's; the file has them reversed.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from open_lm.errors import CheckpointError

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
BLOCK = 32
"""Numbers that share one scale in q8_0."""

TYPES = {"float32": 0, "float16": 1, "q8_0": 8, "bfloat16": 30}
"""Type in which a tensor may be stored, and ggml's number for it."""

FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9


@dataclass(frozen=True)
class Entry:
    """A tensor to write: its name, shape and storage type, and a call that gives its values when they are needed."""

    name: str
    shape: tuple[int, ...]
    type: str
    values: Callable[[], Tensor]

    @property
    def size_bytes(self) -> int:
        n = math.prod(self.shape)
        return n // BLOCK * (BLOCK + 2) if self.type == "q8_0" else n * (4 if self.type == "float32" else 2)


def write_gguf(path: Path, metadata: Mapping[str, Any], entries: Sequence[Entry]) -> None:
    """Write the file; one tensor at a time is in memory."""
    with path.open("wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", VERSION, len(entries), len(metadata)))
        for key, value in metadata.items():
            _write_string(file, key)
            _write_value(file, value)
        offset = 0
        for entry in entries:
            _write_string(file, entry.name)
            dims = entry.shape[::-1]
            file.write(struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, TYPES[entry.type], offset))
            offset += _padded(entry.size_bytes)
        for entry in entries:
            file.write(bytes(-file.tell() % ALIGNMENT))
            before = file.tell()
            file.write(encoded(entry.values(), entry.type))
            assert file.tell() - before == entry.size_bytes, f"{entry.name}: not of the size that the header says"
        file.write(bytes(-file.tell() % ALIGNMENT))


def encoded(tensor: Tensor, kind: str) -> bytes:
    """The bytes of a tensor in one of the storage types."""
    if kind == "q8_0":
        return q8_0(tensor)
    typed = tensor.detach().to(getattr(torch, kind)).contiguous()
    return (typed.view(torch.int16) if kind == "bfloat16" else typed).numpy().tobytes()


def q8_0(tensor: Tensor) -> bytes:
    """Blocks of 32 numbers along the last dimension: a scale in fp16, then each number as its int8 multiple."""
    blocks = tensor.detach().float().reshape(-1, BLOCK).numpy()
    scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales > 0)
    scaled = blocks * inverse
    quantised = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(
        np.int8
    )  # halves away from zero, as ggml
    out = np.empty(len(blocks), dtype=[("scale", "<f2"), ("values", "i1", BLOCK)])
    out["scale"], out["values"] = scales[:, 0], quantised
    return out.tobytes()


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata and the tensors of a file, those in fp32.

    Raises:
        CheckpointError: it is not GGUF version 3, or is damaged.
    """
    content = path.read_bytes()
    file = io.BytesIO(content)
    if file.read(4) != MAGIC:
        raise CheckpointError(f"{path}: not a GGUF file.")
    try:
        version, n_tensors, n_values = struct.unpack("<IQQ", file.read(20))
        if version != VERSION:
            raise CheckpointError(f"{path}: GGUF version {version}, need {VERSION}.")
        metadata = {_read_string(file): _read_value(file) for _ in range(n_values)}
        infos = [_read_info(file) for _ in range(n_tensors)]
        start = file.tell() + -file.tell() % metadata.get("general.alignment", ALIGNMENT)
        return metadata, {name: _decoded(content, start + at, shape, kind) for name, shape, kind, at in infos}
    except (struct.error, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged or of a type that is not read here ({error}).") from error


def _decoded(content: bytes, start: int, shape: tuple[int, ...], kind: str) -> Tensor:
    count = math.prod(shape)
    if kind == "q8_0":
        records = np.frombuffer(content, [("scale", "<f2"), ("values", "i1", BLOCK)], count // BLOCK, start)
        values = records["scale"][:, None].astype(np.float32) * records["values"]
        return torch.from_numpy(values).reshape(shape)
    if kind == "bfloat16":
        raw = np.frombuffer(content, "<i2", count, start)
        return torch.from_numpy(raw.copy()).view(torch.bfloat16).float().reshape(shape)
    raw = np.frombuffer(content, "<f4" if kind == "float32" else "<f2", count, start)
    return torch.from_numpy(raw.astype(np.float32)).reshape(shape)


def _read_info(file: BinaryIO) -> tuple[str, tuple[int, ...], str, int]:
    name = _read_string(file)
    (n_dims,) = struct.unpack("<I", file.read(4))
    *dims, kind, offset = struct.unpack(f"<{n_dims}QIQ", file.read(8 * n_dims + 12))
    return name, tuple(dims[::-1]), {number: name for name, number in TYPES.items()}[kind], offset


def _write_value(file: BinaryIO, value: Any) -> None:
    kind = _kind(value)
    file.write(struct.pack("<I", kind))
    if kind == ARRAY:
        inner = _kind(value[0]) if value else STRING
        inner = INT32 if inner == UINT32 else inner
        file.write(struct.pack("<IQ", inner, len(value)))
        for item in value:
            _write_plain(file, inner, item)
    else:
        _write_plain(file, kind, value)


def _kind(value: Any) -> int:
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, int):
        return UINT32
    return {float: FLOAT32, str: STRING, list: ARRAY}[type(value)]


def _write_plain(file: BinaryIO, kind: int, value: Any) -> None:
    if kind == STRING:
        _write_string(file, value)
    else:
        file.write(struct.pack(FORMATS[kind], value))


def _write_string(file: BinaryIO, text: str) -> None:
    encoded_text = text.encode("utf-8", "surrogateescape")
    file.write(struct.pack("<Q", len(encoded_text)) + encoded_text)


def _read_value(file: BinaryIO, kind: int | None = None) -> Any:
    if kind is None:
        (kind,) = struct.unpack("<I", file.read(4))
    if kind == STRING:
        return _read_string(file)
    if kind == ARRAY:
        inner, length = struct.unpack("<IQ", file.read(12))
        return [_read_value(file, inner) for _ in range(length)]
    return struct.unpack(FORMATS[kind], file.read(struct.calcsize(FORMATS[kind])))[0]


def _read_string(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    return file.read(length).decode("utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return size + -size % ALIGNMENT
