"""Stage 2 of making a data set: one shard from its range of keys in all sorted files, and its row of the manifest."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from typing import IO, cast

import numpy as np

from open_lm import storage
from open_lm.data.shards import write_shard
from open_lm.data.tar import BLOCK
from open_lm.preprocess.job import Job, Workplace
from open_lm.preprocess.shuffle import SortedRuns


def shard_name(number: int) -> str:
    """Eight digits, from 0."""
    return f"{number:08d}"


def make_shard(job: Job, folder: str, target: str, runs: SortedRuns, number: int) -> Iterator[int]:
    """Stage 2: write shard `number` into folder or url `target`, if that has not been done; yields its bytes."""
    work, name = Workplace(folder), shard_name(number)
    done = work.done(f"shard-{name}")
    if done:
        yield done["bytes"]
        return
    start = number * job.shard_size
    stop = min(start + job.shard_size, sum(runs.counts))
    samples = runs.read(start, stop, np.load(io.BytesIO(storage.read_bytes(work.path("bins.npy")))))
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
    yield counted.n_bytes


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
