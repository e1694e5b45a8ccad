"""Stage 2 of making a data set: shards from their range of keys in all sorted files, and their rows of the manifest."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from typing import IO, Any, cast

import numpy as np

from open_lm import storage
from open_lm.data.shards import write_shard
from open_lm.data.tar import BLOCK
from open_lm.errors import StorageError
from open_lm.preprocess.job import Job, Workplace, load_job
from open_lm.preprocess.shuffle import SortedRuns

_TASK_BYTES = 256 << 20
_LEAST_TASKS = 64


def numbered_shard(number: int) -> str:
    """Eight digits, from 0."""
    return f"{number:08d}"


def shard_tasks(job: Job, n_samples: int) -> list[tuple[int, int]]:
    """First and last + 1 of shards that are written together: each sorted file is read once for all of them."""
    n_shards = -(-n_samples // job.shard_size)
    at_once = max(1, _TASK_BYTES // (job.shard_size * job.sample_bytes))
    at_once = min(at_once, max(1, n_shards // _LEAST_TASKS))
    return [(first, min(first + at_once, n_shards)) for first in range(0, n_shards, at_once)]


def make_shards(
    folder: str, job_fingerprint: str, target: str, prefix: str, runs: SortedRuns, first: int, end: int
) -> Iterator[int]:
    """Stage 2: write shards `first` to `end` into folder or url `target`, those that are not there; yields bytes."""
    job, work = load_job(folder, job_fingerprint), Workplace(folder)
    missing = []
    for number in range(first, end):
        done = sound_shard(work, target, prefix + numbered_shard(number))
        if done:
            yield done["bytes"]
        else:
            missing.append(number)
    if not missing:
        return
    start = missing[0] * job.shard_size
    stop = min((missing[-1] + 1) * job.shard_size, sum(runs.counts))
    samples = runs.read(start, stop, np.load(io.BytesIO(storage.read_bytes(work.path("bins.npy")))))
    for number in missing:
        here = number * job.shard_size - start
        yield _make_shard(job, work, target, prefix, number, samples[here : here + job.shard_size])


def sound_shard(work: Workplace, target: str, name: str) -> dict[str, Any] | None:
    """The manifest's row of a shard that is there, whole; None where it must be written (again)."""
    done = work.done(f"shard-{name}")
    if done is None:
        return None
    try:
        return done if storage.size_bytes(storage.join(target, f"{name}.tar")) == done["bytes"] else None
    except StorageError:
        return None


def _make_shard(job: Job, work: Workplace, target: str, prefix: str, number: int, samples: np.ndarray) -> int:
    name, start = prefix + numbered_shard(number), number * job.shard_size
    with storage.open_atomic(storage.join(target, f"{name}.tar")) as file:
        counted = _Counted(file)
        write_shard(cast(IO[bytes], counted), samples, job.data_key, first_number=start)
    row = {
        "shard": name,
        "num_sequences": len(samples),
        "bytes": counted.n_bytes,
        "crc32": f"{counted.crc:08x}",
        "first_key": f"{start:012d}",
        "last_key": f"{start + len(samples) - 1:012d}",
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
