"""Stage 1 of preprocessing: text to sorted blocks of samples, in pure tasks that may run anywhere and again.

Stage 1 reads *blocks* of lines and writes for each one file of samples sorted by a random key; the tokens left over at
the ends of blocks make one more such file. Stage 2 writes each shard from its range of keys in all these files: sorted
by random keys is a true permutation. What a task writes depends on the job alone, not on who runs it or how often.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import tokenizers

from open_lm import storage
from open_lm.data.shards import check_ids
from open_lm.data.tokenizer import Tokenizer
from open_lm.errors import DataError
from open_lm.preprocess.encoding import DocumentEncoder, Unsplittable
from open_lm.preprocess.flat_blocks import Origin, origin_of, write_flat_block
from open_lm.preprocess.input import document_of, read_documents
from open_lm.preprocess.job import FLAT, TAILS, Job, Workplace, block_name, file_and_block, load_job
from open_lm.preprocess.jsonl import BAD_LINE_REASONS, TAR, Line, Rejected, is_packed, is_whole, read_lines
from open_lm.preprocess.long_text import LongText
from open_lm.preprocess.packing import copies, keys_in_order, keys_of_copies, pack, shuffle_keys
from open_lm.preprocess.shuffle import write_sorted

_BATCH_CHARACTERS = 2 << 20
_BATCH_DOCUMENTS = 1024


FileLine = tuple[str, Line]
"""The file a line or member is of, and itself."""


@dataclass(frozen=True)
class TextTask:
    """Inputs `first` to `last`: several small ones as one block; or every `modulus`-th block of a large one, from block
    `residue`, so that several workers can share it."""

    first: int
    last: int
    residue: int = 0
    modulus: int = 1

    @property
    def name(self) -> str:
        """Of its record."""
        return f"read-{self.first:06d}-{self.last:06d}-{self.residue}-{self.modulus}"


def text_tasks(job: Job, n_workers: int) -> list[TextTask]:
    """All inputs as tasks: small neighbours grouped, large ones shared by workers where there are fewer files."""
    total = max(1, sum(size for _, size in job.inputs))
    tasks: list[TextTask] = []
    group: list[int] = []
    held = 0
    for file, (url, size) in enumerate(job.inputs):
        fits = not is_packed(url) and held + size <= job.block_bytes
        if group and not (fits and job.source_of_file(group[0]) == job.source_of_file(file)):
            tasks.append(TextTask(group[0], group[-1]))
            group, held = [], 0
        if not is_packed(url) and size <= job.block_bytes // 2:
            group, held = [*group, file], held + size
            continue
        share = n_workers * size / total  # a packed file is read whole by each worker that shares it
        modulus = max(1, min(n_workers, int(share) if is_packed(url) else round(2 * share)))
        modulus = 1 if is_whole(url) else modulus
        tasks += [TextTask(file, file, residue, modulus) for residue in range(modulus)]
    return [*tasks, TextTask(group[0], group[-1])] if group else tasks


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
        name = block_name(task.first, block)
        record = work.sound_block(name, job) or _tokenize_block(job, work, name, lines, documents)
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
    if not is_packed(url) and not is_whole(url):
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
    job: Job, work: Workplace, name: str, lines: Iterable[FileLine], documents: DocumentEncoder
) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    origins: list[Origin] = []
    pieces: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    for batch in _batches(_documents(job, lines, counts, rejected, origins)):
        try:
            ids, ends = _encoded(job, documents, batch)
        except Unsplittable:
            rejected["cannot_be_split"] += 1
            origins.pop()
            continue
        pieces.append(ids)
        lengths.append(np.diff(ends, prepend=0))
        counts["tokenized"] += len(batch)
    record = {
        "lines": counts["lines"],
        "blank_lines": counts["blank"],
        "bytes": counts["bytes"],
        "tokenized": counts["tokenized"],
        "rejected": dict(sorted(rejected.items())),
        "tokens": sum(map(len, pieces)),
    }
    if job.form == FLAT:
        return work.record(name, record | write_flat_block(job, work, name, pieces, lengths, origins))
    samples, tail = pack(pieces, job.sample_tokens)
    n_written = _write_block(job, work, name, samples, source=job.source(name))
    return work.record(name, record | {"packed": len(samples), "samples": n_written, "tail": tail.tolist()})


def _encoded(job: Job, documents: DocumentEncoder, batch: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a batch of documents, and where each document ends."""
    if isinstance(batch[0], str):
        return documents.encode(batch)
    return documents.encode_long(batch[0]) if isinstance(batch[0], LongText) else _ended(job, batch)


def _write_block(job: Job, work: Workplace, name: str, samples: np.ndarray, *, source: int) -> int:
    """Write a block's samples, as often as the source asks, with their keys; how many that are."""
    n, seed = len(samples), job.seed
    numbers, copy = copies(n, job.sampling[source][1] if job.sampling else 1, seed=seed, block=name)
    if job.shuffle:
        keys = (
            keys_of_copies(numbers, copy, seed=seed, block=name)
            if job.sampling
            else shuffle_keys(n, seed=seed, block=name)
        )
    else:
        file, block = (len(job.inputs), source) if name.startswith(TAILS) else file_and_block(name)
        order = np.lexsort((numbers, copy))  # copies follow when the whole block has been
        numbers, keys = numbers[order], keys_in_order(len(order), file=file, block=block, n_files=len(job.inputs))
    write_sorted(work.path(f"{name}.bin"), samples, keys, numbers)
    return len(numbers)


def _ended(job: Job, documents: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Documents that are ids already, one after the other, an end-of-text id after each that has none; their ends."""
    end = np.array([job.eot_id], job.dtype)
    parts = [part for ids in documents for part in ((ids,) if ids[-1] == job.eot_id else (ids, end))]
    lengths = [len(ids) + (ids[-1] != job.eot_id) for ids in documents]
    return np.concatenate(parts).astype(job.dtype), np.cumsum(lengths)


def _documents(
    job: Job, lines: Iterable[FileLine], counts: Counter[str], rejected: Counter[str], origins: list[Origin]
) -> Iterator[Any]:
    """The texts, or vectors of ids, of the lines that hold one, and their `origins`; all others are counted."""
    here, number = "", 0
    for url, line in lines:
        counts["lines"] += 1
        here, number = url, number + 1 if url == here else 1
        if line.content is None:
            rejected["too_long"] += 1
            continue
        counts["bytes"] += len(line.content) + 1
        found = _document(job, line, url)
        if found is None:
            counts["blank"] += 1
        elif isinstance(found, Rejected):
            if found.reason in BAD_LINE_REASONS and job.on_bad_line == "stop":
                raise _bad_line(job, url, line, found)
            rejected[found.reason] += 1
        else:
            if job.form == FLAT:
                origins.append(origin_of(url, number, line))
            yield found


def _document(job: Job, line: Line, url: str) -> Any:
    found = document_of(url, line, job.content_key)
    if not isinstance(found, np.ndarray):
        return found
    try:
        return check_ids(found, job.vocab_size)
    except ValueError:
        return Rejected("not_ids")


def _bad_line(job: Job, url: str, line: Line, rejected: Rejected) -> DataError:
    what = {
        "missing_key": f"no key {job.content_key!r}",
        "not_text": f"{job.content_key!r} holds no text",
        "not_ids": f"no vector of ids below {job.vocab_size}",
    }
    found = what.get(rejected.reason, rejected.reason.replace("_", " "))
    if line.offset == 0 and (line.content or b"").lstrip().startswith(b"["):
        found = "a JSON array, where each line should be an object (`jq -c '.[]'` makes them)"
    if url.endswith(TAR):
        return DataError(
            f"{storage.shown(url)}, member at byte {line.offset}: {found}: {(line.content or b'')[:60]!r}. "
            "Repair it, or leave such members out and counted with --on-bad-line skip."
        )
    before = sum(
        1 for earlier in read_lines(url, max_line_bytes=job.max_document_bytes) if earlier.offset < line.offset
    )
    return DataError(
        f"{storage.shown(url)}, line {before + 1}: {found}: {(line.content or b'')[:60]!r}. "
        "Repair it, name the key with --content-key, or leave such lines out and counted with --on-bad-line skip."
    )


def _batches(documents: Iterable[Any]) -> Iterator[list[Any]]:
    batch: list[Any] = []
    held = 0
    for document in documents:
        if batch and (type(document) is not type(batch[0]) or isinstance(document, LongText)):
            yield batch
            batch, held = [], 0
        batch.append(document)
        held += len(document)
        if held >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


@lru_cache(maxsize=2)
def document_encoder(folder: str, name: str, eot_token: str, encoder: str, dtype: str) -> DocumentEncoder:
    """Loading a tokenizer takes a while; a process does it once."""
    backend = tokenizers.Tokenizer.from_str(storage.read_text(storage.join(folder, "tokenizer.json")))
    return DocumentEncoder(Tokenizer(backend, name, eot_token=eot_token), encoder, np.dtype(dtype))


def join_tails(job: Job, folder: str, blocks: list[str]) -> None:
    """The tokens left over at the ends of all blocks of each source, in their order, as one more block."""
    work = Workplace(folder)
    for source, name in enumerate(job.tail_blocks):
        if work.sound_block(name, job):
            continue
        mine = [block for block in blocks if job.source(block) == source]
        tails = [np.array(record["tail"], job.dtype) for record in work.records(mine)]
        samples, tail = pack(tails, job.sample_tokens)
        n_written = _write_block(job, work, name, samples, source=source)
        work.record(name, {"packed": len(samples), "samples": n_written, "tail": len(tail)})
