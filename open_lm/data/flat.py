"""Flat token arrays (OLMo, dolma): ids in a `.npy` without header, document boundaries in a `.csv.gz`."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import zlib
from typing import Any

import numpy as np

from open_lm import storage
from open_lm.data.formats import token_dtype
from open_lm.data.manifest import Shard
from open_lm.errors import DataError

FLAT_KEYS: dict[str, Any] = {"flat-u2": np.dtype("<u2"), "flat-u4": np.dtype("<u4")}
"""Stand for a member's extension in a source of flat arrays."""


def open_flat(url: str, *, vocab_size: int, sample_tokens: int, documents: bool = False) -> Shard:
    """A flat array as a shard of samples of `sample_tokens` ids; what is left at its end fills no sample.

    With `documents` its .csv.gz, where there is one, says with which id documents end.

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
    key, eot_id = f"flat-u{dtype.itemsize}", end_of_documents(url, dtype) if documents else None
    layout = (0, size, size)
    return Shard(url.rpartition("/")[2], url, n_sequences, key=key, layout=layout, size_bytes=n_bytes, eot_id=eot_id)


def end_of_documents(url: str, dtype: np.dtype) -> int | None:
    """The id that ends the documents of a flat array, by the places that the .csv.gz beside it names; None without one.

    Raises:
        DataError: it is no such table, or documents do not end with one id.
    """
    table = url.removesuffix(".npy") + ".csv.gz"
    if not storage.exists(table):
        return None
    ends = _first_ends(table)
    width, inside = dtype.itemsize, ends[:-1] or ends  # the last document may go on in the next array
    last_ids = [storage.read_range(url, (end - 1) * width, end * width) for end in inside]
    found = {int.from_bytes(content, "little") for content in last_ids if len(content) == width}
    if len(found) != 1:
        raise DataError(
            f"{storage.shown(table)}: by it documents end with several ids ({sorted(found)[:5]}). Copy it again, or "
            "give --doc-mask-token."
        )
    return found.pop()


_DOCUMENTS_LOOKED_AT = 65


def _first_ends(table: str) -> list[int]:
    """Ends of the first documents of a table."""
    try:
        with storage.open_read(table) as file, gzip.open(file, "rt", newline="") as rows:
            ends = [int(row[1]) for row in itertools.islice(csv.reader(rows), _DOCUMENTS_LOOKED_AT)]
    except (OSError, EOFError, ValueError, IndexError, zlib.error, csv.Error) as error:
        raise DataError(f"{storage.shown(table)}: no table of start,end,… ({error}). Copy it again.") from None
    if not ends or ends[0] < 1:
        raise DataError(f"{storage.shown(table)}: names no documents. Copy it again, or remove it.")
    return ends


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
