"""How text becomes shards: two stages of pure tasks, so that any of them may run anywhere, be killed, and run again.

Stage 1 reads *blocks* of lines and writes for each one file of samples sorted by a random key; the tokens left over at
the ends of blocks make one more such file. Stage 2 writes each shard from its range of keys in all these files: sorted
by random keys is a true permutation. What a task writes depends on the job alone, not on who runs it or how often.
"""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import orjson
import tokenizers

from open_lm import storage
from open_lm.data.encoding import DocumentEncoder
from open_lm.data.formats import token_dtype
from open_lm.data.packing import pack, shuffle_keys
from open_lm.data.runs import SortedRuns, write_sorted
from open_lm.data.shards import BLOCK, write_shard
from open_lm.data.text_input import BAD_LINE_REASONS, Line, Rejected, document_text, is_packed, read_lines
from open_lm.data.tokenizers import Tokenizer
from open_lm.errors import DataError

VERSION = 1
_BATCH_CHARACTERS = 2 << 20
_BATCH_DOCUMENTS = 1024
TAILS = "tails"
"""Name of the block made of the tokens left over in the others."""


@dataclass(frozen=True)
class Job:
    """All that decides what is written, byte for byte. `inputs` are (url, size in bytes)."""

    inputs: tuple[tuple[str, int], ...]
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    eot_token: str
    eot_id: int
    seq_len: int
    shard_size: int
    data_key: str
    content_key: str
    seed: int
    on_bad_line: str
    max_document_bytes: int
    block_bytes: int
    version: int = VERSION

    @property
    def sample_tokens(self) -> int:
        return self.seq_len + 1

    @property
    def dtype(self) -> np.dtype:
        return token_dtype(self.vocab_size)

    def to_json(self) -> bytes:
        return orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2)


def choose_block_bytes(total_bytes: int) -> int:
    """How much text one block holds: 8 MiB for small corpora, up to 128 MiB so that a huge one has not too many."""
    return max(8 << 20, min(128 << 20, total_bytes >> 8))


@dataclass(frozen=True)
class Workplace:
    """The folder that holds a job's unfinished work; whatever has its final name in it is complete."""

    folder: str

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def done(self, name: str) -> dict[str, Any] | None:
        """The record of a finished task, None for an unfinished one."""
        path = Path(self.path(f"{name}.json"))
        return orjson.loads(path.read_bytes()) if path.exists() else None

    def record(self, name: str, record: dict[str, Any]) -> dict[str, Any]:
        storage.write_bytes(self.path(f"{name}.json"), orjson.dumps(record))
        return record


@dataclass(frozen=True)
class FileTask:
    """Every `modulus`-th block of one input, from block `residue`: several workers can share one file."""

    file: int
    residue: int
    modulus: int


def tokenize(job: Job, folder: str, encoder: str, task: FileTask) -> Iterator[int]:
    """Stage 1. Yields the text bytes of each block as it is finished; blocks finished before are passed over.

    Raises:
        DataError: the file is damaged, or holds a bad line and `on_bad_line` is `stop`.
    """
    work, (url, size) = Workplace(folder), job.inputs[task.file]
    documents = _document_encoder(folder, job.tokenizer, job.eot_token, encoder, job.dtype.str)
    last = -1
    for block, lines in _blocks(job, url, size, task):
        last = block
        name = block_name(task.file, block)
        record = work.done(name)
        if not record:
            record = _tokenize_block(job, work, name, lines, documents, url)
        yield record["bytes"]
    work.record(f"{block_name(task.file, 0)}-read-{task.residue}-{task.modulus}", {"last_block": last})


def block_name(file: int, block: int) -> str:
    """Names sort as the blocks stand in the corpus."""
    return f"block-{file:06d}-{block:07d}"


def _blocks(job: Job, url: str, size: int, task: FileTask) -> Iterator[tuple[int, Iterator[Line]]]:
    """The task's blocks and the lines that begin in them. A packed file is read once; others only where needed."""
    step, limit = job.block_bytes, job.max_document_bytes
    if not is_packed(url):
        for block in range(task.residue, -(-size // step), task.modulus):
            lines = read_lines(url, start=block * step, stop=(block + 1) * step, max_line_bytes=limit)
            yield block, lines
        return
    every_line = read_lines(url, max_line_bytes=limit)
    held = next(every_line, None)
    while held is not None:
        block = held.offset // step
        state: list[Line | None] = [held]
        lines = _lines_until(every_line, state, (block + 1) * step)
        if block % task.modulus == task.residue:
            yield block, lines
        for _ in lines:
            pass
        held = state[0]


def _lines_until(lines: Iterator[Line], state: list[Line | None], stop: int) -> Iterator[Line]:
    """Lines that begin before `stop`; the first one after it is left in `state`."""
    while state[0] is not None and state[0].offset < stop:
        yield state[0]
        state[0] = next(lines, None)


def _tokenize_block(
    job: Job, work: Workplace, name: str, lines: Iterable[Line], documents: DocumentEncoder, url: str
) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    pieces: list[np.ndarray] = []
    for texts in _batches(_texts(job, lines, url, counts, rejected)):
        pieces.append(documents.encode(texts))
        counts["tokenized"] += len(texts)
    samples, tail = pack(pieces, job.sample_tokens)
    write_sorted(work.path(f"{name}.bin"), samples, shuffle_keys(len(samples), seed=job.seed, block=name))
    record = {
        "lines": counts["lines"],
        "blank_lines": counts["blank"],
        "bytes": counts["bytes"],
        "tokenized": counts["tokenized"],
        "rejected": dict(sorted(rejected.items())),
        "tokens": sum(map(len, pieces)),
        "samples": len(samples),
        "tail": tail.tolist(),
    }
    return work.record(name, record)


def _texts(job: Job, lines: Iterable[Line], url: str, counts: Counter[str], rejected: Counter[str]) -> Iterator[str]:
    for line in lines:
        counts["lines"] += 1
        if line.content is None:
            rejected["too_long"] += 1
            continue
        counts["bytes"] += len(line.content) + 1
        text = document_text(line, job.content_key)
        if isinstance(text, str):
            yield text
        elif text is None:
            counts["blank"] += 1
        else:
            if text.reason in BAD_LINE_REASONS and job.on_bad_line == "stop":
                raise _bad_line(job, url, line, text)
            rejected[text.reason] += 1


def _bad_line(job: Job, url: str, line: Line, rejected: Rejected) -> DataError:
    before = sum(
        1 for earlier in read_lines(url, max_line_bytes=job.max_document_bytes) if earlier.offset < line.offset
    )
    what = {"missing_key": f"no key {job.content_key!r}", "not_text": f"{job.content_key!r} holds no text"}
    found = what.get(rejected.reason, rejected.reason.replace("_", " "))
    return DataError(
        f"{storage.shown(url)}, line {before + 1}: {found}: {(line.content or b'')[:60]!r}. "
        "Repair it, name the key with --content-key, or leave such lines out and counted with --on-bad-line skip."
    )


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if held >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


@lru_cache(maxsize=2)
def _document_encoder(folder: str, name: str, eot_token: str, encoder: str, dtype: str) -> DocumentEncoder:
    """Loading a tokenizer takes a while; a process does it once."""
    backend = tokenizers.Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    return DocumentEncoder(Tokenizer(backend, name, eot_token=eot_token), encoder, np.dtype(dtype))


def join_tails(job: Job, folder: str, blocks: list[str]) -> dict[str, Any]:
    """The tokens left over at the ends of all blocks, in their order, as one more block."""
    work = Workplace(folder)
    done = work.done(TAILS)
    if done:
        return done
    tails = [np.array(cast(dict, work.done(name))["tail"], job.dtype) for name in blocks]
    samples, tail = pack(tails, job.sample_tokens)
    write_sorted(work.path(f"{TAILS}.bin"), samples, shuffle_keys(len(samples), seed=job.seed, block=TAILS))
    return work.record(TAILS, {"samples": len(samples), "tail": len(tail)})


def shard_name(number: int) -> str:
    """Eight digits, from 0."""
    return f"{number:08d}"


def make_shard(job: Job, folder: str, target: str, runs: SortedRuns, number: int) -> int:
    """Stage 2: write shard `number` into folder or url `target`, if that has not been done; its bytes."""
    work, name = Workplace(folder), shard_name(number)
    done = work.done(f"shard-{name}")
    if done:
        return done["bytes"]
    start = number * job.shard_size
    stop = min(start + job.shard_size, sum(runs.counts))
    samples = runs.read(start, stop, np.load(work.path("bins.npy")))
    with storage.open_atomic(storage.join(target, f"{name}.tar")) as file:
        counted = _Counted(file)
        write_shard(cast(IO[bytes], counted), samples, job.data_key, first_number=start)
    row = {
        "shard": name,
        "num_sequences": len(samples),
        "bytes": counted.n_bytes,
        "crc32": f"{counted.crc:08x}",
        "first_key": f"{start:012d}",
        "last_key": f"{stop - 1:012d}",
        "seq_len": job.seq_len,
        "data_key": job.data_key,
        "tokenizer": job.tokenizer,
        "eot_id": job.eot_id,
    }
    layout = _layout(job, len(samples), counted)
    work.record(f"shard-{name}", row | ({"layout": layout} if layout else {}))
    return counted.n_bytes


def _layout(job: Job, n_samples: int, written: _Counted) -> list[int] | None:
    if job.data_key != "npy":
        return None
    step = (written.n_bytes - 2 * BLOCK) // n_samples
    return [BLOCK, step, int(written.first_size, 8)]


class _Counted:
    """A file that keeps count of what is written through it."""

    def __init__(self, file: IO[bytes]):
        self._file, self.n_bytes, self.crc, self.first_size = file, 0, 0, b""

    def write(self, content: bytes | memoryview) -> int:
        view = memoryview(content).cast("B")
        if not self.n_bytes:
            self.first_size = bytes(view[124:135])
        self.crc = zlib.crc32(view, self.crc)
        self.n_bytes += len(view)
        self._file.write(view)
        return len(view)
