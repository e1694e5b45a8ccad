"""Merging of sorted files, many into one, until so few are left that a shard is gathered from all of them.

Without it each shard would read from each block, blocks x shards reads. With it a sample is read and written once more
for each round, of which there are log(blocks) to the base of 64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from open_lm import storage
from open_lm.preprocess.job import Job, Workplace, load_job
from open_lm.preprocess.shuffle import SortedRuns
from open_lm.preprocess.workers import RunTasks

FAN_IN = 64
MOST_RUNS = 256
"""So many sorted files may be left."""


def runs_of(job: Job, folder: str, names: Sequence[str]) -> SortedRuns:
    """The sorted files of finished blocks or merges."""
    counts = [record["samples"] for record in Workplace(folder).records(names)]
    return SortedRuns(folder, tuple(names), tuple(counts), job.sample_tokens, job.dtype.str)


def merge_all(job: Job, work: Workplace, names: list[str], n_workers: int, run: RunTasks) -> list[str]:
    """Names of at most `MOST_RUNS` sorted files with the samples of all of `names`."""
    level = 0
    while len(names) > MOST_RUNS:
        groups = [names[k : k + FAN_IN] for k in range(0, len(names), FAN_IN)]
        merged = [f"merged-{level}-{number:06d}" for number in range(len(groups))]
        calls = [
            partial(merge, work.folder, job.fingerprint, tuple(group), name)
            for group, name in zip(groups, merged, strict=True)
        ]
        run(calls, n_workers, label="merge", total_bytes=runs_of(job, work.folder, names).size_bytes)
        names, level = merged, level + 1
    return names


def merge(folder: str, job_fingerprint: str, names: tuple[str, ...], target: str) -> Iterator[int]:
    """Write one sorted file with the samples of several, if that has not been done; yields the bytes of samples."""
    job, work = load_job(folder, job_fingerprint), Workplace(folder)
    done = work.sound_block(target, job)
    if done:
        yield done["samples"] * job.sample_bytes
        return
    runs = runs_of(job, folder, names)
    with storage.open_atomic(work.path(f"{target}.bin")) as file:
        for piece in runs.merge():
            file.write(piece)
    work.record(target, {"samples": sum(runs.counts)})
    yield runs.size_bytes
