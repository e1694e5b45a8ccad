"""Flat arrays as OLMo and dolma read them: ids without header in .npy, and a .csv.gz that says of each document where
it lies and where it came from."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import orjson

from open_lm import storage
from open_lm.data.permutations import key
from open_lm.errors import DataError, StorageError
from open_lm.preprocess.accounting import BlockRecords
from open_lm.preprocess.job import Job, Workplace, file_and_block, load_job
from open_lm.preprocess.workers import RunTasks

_TRIES = 3


@dataclass(frozen=True)
class BlockSpan:
    """Ids `start` to `stop` of a block; `lines_before` are those of its file in earlier blocks."""

    block: str
    start: int
    stop: int
    lines_before: int


def array_name(number: int) -> str:
    """As dolma names them, less the number of the process."""
    return f"part-{number:05d}"


def write_arrays(
    job: Job, work: Workplace, target: str, blocks: BlockRecords, n_workers: int, run: RunTasks
) -> list[dict[str, Any]]:
    """Write all arrays into folder or url `target`, those that are not there; what there is of each."""
    arrays = plan_arrays(job, blocks)
    names = [array_name(number) for number in range(len(arrays))]
    calls = [
        partial(make_array, work.folder, job.fingerprint, target, name, tuple(parts))
        for name, parts in zip(names, arrays, strict=True)
    ]
    n_bytes = sum(part.stop - part.start for parts in arrays for part in parts) * job.dtype.itemsize
    for _ in range(_TRIES):
        run(calls, n_workers, label="write arrays", total_bytes=n_bytes)
        rows = work.for_each(names, partial(sound_array, work, target))
        if all(rows):
            return [row for row in rows if row]
    raise DataError(f"{target}: written arrays disappear. Is something else deleting there?")


def plan_arrays(job: Job, blocks: BlockRecords) -> list[list[BlockSpan]]:
    """The parts of blocks that each array is made of: blocks in the order of a hash, arrays of equal length.

    Raises:
        DataError: there is no document.
    """
    before = {}
    for _, several in groupby(sorted(blocks), key=lambda name: file_and_block(name)[0]):
        n_lines = 0
        for name in several:
            before[name] = n_lines
            n_lines += blocks[name]["lines"]
    size = job.shard_size * job.sample_tokens
    order = sorted(blocks, key=lambda name: int(key("block", job.seed, name))) if job.shuffle else sorted(blocks)
    arrays: list[list[BlockSpan]] = []
    room = 0
    for name in order:
        start, n = 0, blocks[name]["tokens"]
        while start < n:
            if not room:
                arrays.append([])
                room = size
            stop = min(n, start + room)
            arrays[-1].append(BlockSpan(name, start, stop, before[name]))
            start, room = stop, room - (stop - start)
    if not arrays:
        raise DataError("--input-files: no document in them. Give more text, or check --content-key.")
    return arrays


def sound_array(work: Workplace, target: str, name: str) -> dict[str, Any] | None:
    """The record of an array that is there, whole, with its documents; None where it must be written (again)."""
    done = work.done(f"array-{name}")
    if done is None:
        return None
    try:
        sizes = [storage.size_bytes(storage.join(target, name + ending)) for ending in (".npy", ".csv.gz")]
    except StorageError:
        return None
    return done if sizes == [done["bytes"], done["csv_bytes"]] else None


def make_array(folder: str, job_fingerprint: str, target: str, name: str, parts: Sequence[BlockSpan]) -> Iterator[int]:
    """Write one array and its documents, if that has not been done; yields its bytes."""
    job, work = load_job(folder, job_fingerprint), Workplace(folder)
    done = sound_array(work, target, name)
    if done:
        yield done["bytes"]
        return
    width, rows, n_tokens = job.dtype.itemsize, list[list[Any]](), 0
    with storage.open_atomic(storage.join(target, f"{name}.npy")) as file:
        for part in parts:
            content = storage.read_range(work.path(f"{part.block}.bin"), part.start * width, part.stop * width)
            if len(content) != (part.stop - part.start) * width:
                raise DataError(f"{work.folder}: {part.block} is cut off. Go on with --resume.")
            file.write(content)
            rows += _documents(work, part, n_tokens)
            n_tokens += part.stop - part.start
            yield len(content)
    table = _table(rows)
    storage.write_bytes(storage.join(target, f"{name}.csv.gz"), table)
    record = {"array": name, "tokens": n_tokens, "documents": len(rows), "bytes": n_tokens * width}
    work.record(f"array-{name}", record | {"csv_bytes": len(table)})


def _documents(work: Workplace, part: BlockSpan, first: int) -> Iterator[list[Any]]:
    """Start, end, id, source and line (from 1) of the documents of a part that begins at id `first` of its array; one
    that goes on in another array is in both."""
    end = 0
    for line in storage.read_bytes(work.path(f"{part.block}.docs")).splitlines():
        n, url, number, its_id = orjson.loads(line)
        start, end = end, end + n
        low, high = max(start, part.start), min(end, part.stop)
        if low < high:
            shift = first - part.start
            yield [low + shift, high + shift, its_id, storage.shown(storage.from_text(url)), part.lines_before + number]


def _table(rows: Sequence[Sequence[Any]]) -> bytes:
    text, packed = io.StringIO(), io.BytesIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file:
        file.write(text.getvalue().encode())
    return packed.getvalue()
