"""Flat token arrays (OLMo, dolma): ids in a `.npy` without header, document boundaries in a `.csv.gz`."""

from __future__ import annotations

import gzip
import io
from typing import Any

import numpy as np

from open_lm import storage
from open_lm.data.formats import token_dtype
from open_lm.data.manifest import Shard
from open_lm.errors import DataError

FLAT_KEYS: dict[str, Any] = {"flat-u2": np.dtype("<u2"), "flat-u4": np.dtype("<u4")}
"""Stand for a member's extension in a source of flat arrays."""


def open_flat(url: str, *, vocab_size: int, sample_tokens: int) -> Shard:
    """A flat array as a shard of samples of `sample_tokens` ids; what is left at its end fills no sample.

    Raises:
        DataError: it has a numpy header, an odd size, ids of another width or vocabulary, or is too short.
    """
    dtype = token_dtype(vocab_size)
    n_bytes, shown = storage.size_bytes(url), storage.shown(url)
    head = storage.read_range(url, 0, 4096)
    if head.startswith(b"\x93NUMPY"):
        raise DataError(f"{shown}: a numpy file with a header. Flat arrays have none: write it with ndarray.tofile.")
    if n_bytes % dtype.itemsize:
        raise DataError(f"{shown}: {n_bytes} bytes hold no whole number of {dtype} ids. Copy it again.")
    ids = np.frombuffer(head[: len(head) // 4 * 4], dtype)
    if dtype.itemsize == 2 and len(ids) >= 64 and ids[::2].any() and not ids[1::2].any():
        raise DataError(
            f"{shown}: looks like uint32, but a vocabulary of {vocab_size} is stored as uint16. Check the tokenizer."
        )
    if len(ids) and int(ids.max()) >= vocab_size:
        raise DataError(
            f"{shown}: id {int(ids.max())} as {dtype} is outside a vocabulary of {vocab_size}. Check the tokenizer."
        )
    n_sequences = n_bytes // (dtype.itemsize * sample_tokens)
    if not n_sequences:
        raise DataError(f"{shown}: {n_bytes // dtype.itemsize} ids make no sample of {sample_tokens}.")
    size = dtype.itemsize * sample_tokens
    key = f"flat-u{dtype.itemsize}"
    return Shard(url.rpartition("/")[2], url, n_sequences, key=key, layout=(0, size, size), size_bytes=n_bytes)


def documents_csv(tokens: np.ndarray, eot_id: int, source: str, first_number: int = 0) -> bytes:
    """The .csv.gz of a flat array: start, end (in ids), id, source and place of each document, `eot_id` its last."""
    ends = np.flatnonzero(tokens == eot_id) + 1
    if not len(ends) or ends[-1] != len(tokens):
        ends = np.append(ends, len(tokens))
    starts = np.concatenate([[0], ends[:-1]])
    rows = "".join(
        f"{start},{end},{first_number + k},{source},{k + 1}\n"
        for k, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True))
    )
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file:
        file.write(rows.encode())
    return packed.getvalue()
