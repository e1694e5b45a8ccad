"""Stage 1 of preprocessing: text to sorted blocks of samples, in pure tasks that may run anywhere and again.

Stage 1 reads *blocks* of lines and writes for each one file of samples sorted by a random key; the tokens left over at
the ends of blocks make one more such file. Stage 2 writes each shard from its range of keys in all these files: sorted
by random keys is a true permutation. What a task writes depends on the job alone, not on who runs it or how often.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import tokenizers

from open_lm import storage
from open_lm.data.tokenizer import Tokenizer
from open_lm.preprocess.encoding import DocumentEncoder, Unsplittable
from open_lm.preprocess.flat_blocks import Origin, write_flat_block
from open_lm.preprocess.input import LineBooks, documents_in, read_documents
from open_lm.preprocess.job import FLAT, Job, TextTask, Workplace, block_name, load_job
from open_lm.preprocess.jsonl import PACKED, WHOLE, FileLine, Line, line_batches, read_lines
from open_lm.preprocess.packing import write_block


def tokenize(folder: str, job_fingerprint: str, encoder: str, task: TextTask) -> Iterator[int]:
    """Stage 1. Yields the text bytes of each block as it is finished; already finished blocks are skipped.

    Raises:
        DataError: a file is damaged, or holds a bad line and `on_bad_line` is `stop`.
    """
    job, work = load_job(folder, job_fingerprint), Workplace(folder)
    done = work.done(task.name)
    if done and all(work.sound_block(name, job) for name in done["blocks"]):
        yield done["bytes"]
        return
    documents = document_encoder(folder, job.tokenizer, job.eot_token, encoder, job.dtype.str)
    blocks, n_bytes = [], 0
    for block, lines in _blocks(job, task):
        name, record = _tokenize_block(job, work, task.first, block, lines, documents)
        blocks.append(name)
        n_bytes += record["bytes"]
        yield record["bytes"]
    work.record(task.name, {"blocks": blocks, "bytes": n_bytes})


def _blocks(job: Job, task: TextTask) -> Iterator[tuple[int, Iterator[FileLine]]]:
    """The task's blocks and the lines that begin in them. A packed file is read once; others only where needed."""
    step, limit = job.block_bytes, job.max_document_bytes
    url, size = job.inputs[task.first]
    if task.first < task.last:
        files = [url for url, _ in job.inputs[task.first : task.last + 1]]
        yield 0, ((url, line) for url in files for line in read_documents(url, job.content_key, max_bytes=limit))
        return
    if not url.endswith((*PACKED, *WHOLE)):
        for block in range(task.residue, -(-size // step), task.modulus):
            lines = read_lines(url, start=block * step, stop=(block + 1) * step, max_line_bytes=limit)
            yield block, ((url, line) for line in lines)
        return
    every_line = read_documents(url, job.content_key, max_bytes=limit)
    held = next(every_line, None)
    while held is not None:
        block = held.offset // step
        state: list[Line | None] = [held]
        lines = _lines_until(every_line, state, (block + 1) * step)
        if block % task.modulus == task.residue:
            yield block, ((url, line) for line in lines)
        for _ in lines:
            pass
        held = state[0]


def _lines_until(lines: Iterator[Line], state: list[Line | None], stop: int) -> Iterator[Line]:
    """Lines that begin before `stop`; the first one after it is left in `state`."""
    while state[0] is not None and state[0].offset < stop:
        yield state[0]
        state[0] = next(lines, None)


def _tokenize_block(
    job: Job, work: Workplace, file: int, block: int, lines: Iterable[FileLine], encoder: DocumentEncoder
) -> tuple[str, dict[str, Any]]:
    """Write the samples (or documents, of flat arrays) of one block, if that has not been done; its name and record."""
    name = block_name(file, block)
    done = work.sound_block(name, job)
    if done:
        return name, done
    books, pieces, lengths, origins = LineBooks(), list[np.ndarray](), list[np.ndarray](), list[Origin]()
    for some in line_batches(lines):
        for found in documents_in(job, some, books):
            try:
                ids, ends = encoder.encode(found.documents)
            except Unsplittable:
                books.rejected["cannot_be_split"] += 1
                continue
            pieces.append(ids)
            lengths.append(np.diff(ends, prepend=0))
            origins += found.origins
    record = {
        "lines": books.lines,
        "blank_lines": books.blank,
        "bytes": books.n_bytes,
        "tokenized": sum(map(len, lengths)),
        "rejected": dict(sorted(books.rejected.items())),
        "tokens": sum(map(len, pieces)),
    }
    if job.form == FLAT:
        return name, work.record(name, record | write_flat_block(job, work, name, pieces, lengths, origins))
    return name, write_block(job, work, name, pieces, record, source=job.source(name) if job.sampling else 0)


@lru_cache(maxsize=2)
def document_encoder(folder: str, name: str, eot_token: str, encoder: str, dtype: str) -> DocumentEncoder:
    """Loading a tokenizer takes a while; a process does it once."""
    backend = tokenizers.Tokenizer.from_str(storage.read_text(storage.join(folder, "tokenizer.json")))
    return DocumentEncoder(Tokenizer(backend, name, eot_token=eot_token), encoder, np.dtype(dtype))
