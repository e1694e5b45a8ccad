"""Flat blocks: stage 1 of making flat arrays, the ids of whole documents in random order, and where each came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import orjson

from open_lm import storage
from open_lm.preprocess.job import Job, Workplace
from open_lm.preprocess.jsonl import TAR, WHOLE, Line
from open_lm.preprocess.long_text import LONG_BYTES
from open_lm.preprocess.packing import shuffle_keys


class Origin(NamedTuple):
    """A document's file, the number of its line among those of the file in its block, and the `id` of its JSON."""

    url: str
    number: int
    id: str


def origin_of(url: str, number: int, line: Line) -> Origin:
    """The origin of a document: file, number, id; an `id` that is neither text nor a whole number is left out."""
    content = line.content or b""
    if url.endswith((*WHOLE, TAR)) or len(content) > LONG_BYTES or b'"id"' not in content:
        return Origin(url, number, "")
    try:
        found = orjson.loads(content.removeprefix(b"\xef\xbb\xbf")).get("id")
    except (orjson.JSONDecodeError, AttributeError):
        found = None
    return Origin(url, number, str(found) if type(found) in (int, str) else "")


def write_flat_block(
    job: Job,
    work: Workplace,
    name: str,
    pieces: Sequence[np.ndarray],
    lengths: Sequence[np.ndarray],
    origins: Sequence[Origin],
) -> dict[str, int]:
    """Write the documents of a block, shuffled: their ids, and a line [n_ids, file, line, id] for each; what the
    record says of it."""
    tokens = np.concatenate([np.zeros(0, job.dtype), *pieces])
    sizes = np.concatenate([np.zeros(0, np.int64), *lengths])
    starts = np.cumsum(sizes) - sizes
    keys = shuffle_keys(len(sizes), seed=job.seed, block=name)
    order = np.argsort(keys, kind="stable").tolist() if job.shuffle else range(len(sizes))
    with storage.open_atomic(work.path(f"{name}.bin")) as file:
        for k in order:
            file.write(tokens[starts[k] : starts[k] + sizes[k]].tobytes())
    rows = [orjson.dumps([int(sizes[k]), storage.to_text(origins[k].url), *origins[k][1:]]) for k in order]
    content = b"".join(row + b"\n" for row in rows)
    storage.write_bytes(work.path(f"{name}.docs"), content)
    return {"docs_bytes": len(content), "samples": 0, "packed": 0}
