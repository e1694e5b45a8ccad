"""Packing of documents into samples of equal length, none lost, with a random sort key each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from open_lm.data.permutations import key, mix
from open_lm.preprocess.job import TAILS, Job, Workplace, file_and_block

_MOST_BLOCKS = 1 << 20


def pack(pieces: Sequence[np.ndarray], sample_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """All tokens one after the other, cut into samples (n, sample_tokens), and the tail that fills none."""
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, np.uint16)
    n = len(tokens) // sample_tokens
    return tokens[: n * sample_tokens].reshape(n, sample_tokens), tokens[n * sample_tokens :]


def shuffle_keys(n: int, *, seed: int, block: str) -> np.ndarray:
    """uint64 by which the `n` samples of one block are sorted among all: a hash of seed, block name and number."""
    return mix(key("sample", seed, block) ^ mix(np.arange(n, dtype=np.uint64)))


def copies(n: int, frequency: float, *, seed: int, block: str) -> tuple[np.ndarray, np.ndarray]:
    """Samples of a block's `n` that are written, each as often as it is: their numbers, and which copy each one is.

    Each is written `frequency` times on average: the whole part of it always, once more by a hash of seed and number.
    """
    chance = mix(key("copies", seed, block) ^ mix(np.arange(n, dtype=np.uint64))) / 2.0**64
    times = int(frequency) + (chance < frequency - int(frequency))
    numbers = np.repeat(np.arange(n), times)
    return numbers, np.arange(len(numbers)) - np.repeat(np.cumsum(times) - times, times)


def keys_of_copies(numbers: np.ndarray, copy: np.ndarray, *, seed: int, block: str) -> np.ndarray:
    """`shuffle_keys` of copies: those of one sample are random, but lie apart by at least half an even spacing."""
    n = int(numbers.max()) + 1 if len(numbers) else 0
    times = np.bincount(numbers, minlength=n)[numbers].astype(np.uint64)
    spacing = np.uint64(2**64 - 1) // np.maximum(times, np.uint64(1))
    jitter = mix(key("place", seed, block) ^ mix(numbers.astype(np.uint64)) + mix(copy.astype(np.uint64)))
    jitter = np.where(times > 1, jitter % (spacing // np.uint64(2) + np.uint64(1)), np.uint64(0))
    return shuffle_keys(n, seed=seed, block=block)[numbers] + copy.astype(np.uint64) * spacing + jitter


def keys_in_order(n: int, *, file: int, block: int, n_files: int) -> np.ndarray:
    """Keys that keep the samples as they stand in the corpus: by file, block of it, and number."""
    share = 2**64 // (n_files + 1)
    return np.uint64(file * share + block * (share // _MOST_BLOCKS)) + np.arange(n, dtype=np.uint64)


def write_block(
    job: Job, work: Workplace, name: str, pieces: Sequence[np.ndarray], record: dict[str, Any], *, source: int
) -> dict[str, Any]:
    """Pack documents into samples and write them with their keys, as often as their source asks; the block's `record`,
    completed with how many there are and the tokens left over."""
    samples, tail = pack(pieces, job.sample_tokens)
    n_written, numbers, copy = len(samples), None, None
    if job.sampling:
        numbers, copy = copies(n_written, job.sampling[source][1], seed=job.seed, block=name)
        n_written = len(numbers)
    is_tails = name.startswith(TAILS)
    if not job.shuffle:
        file, block = (len(job.inputs), source) if is_tails else file_and_block(name)
        if numbers is not None and copy is not None:
            numbers = numbers[np.lexsort((numbers, copy))]  # copies follow when the whole block has been
        keys = keys_in_order(n_written, file=file, block=block, n_files=len(job.inputs))
    elif numbers is not None and copy is not None:
        keys = keys_of_copies(numbers, copy, seed=job.seed, block=name)
    else:
        keys = shuffle_keys(n_written, seed=job.seed, block=name)
    left = len(tail) if is_tails else tail.tolist()
    record = {**record, "packed": len(samples), "samples": n_written, "tail": left}
    return work.write_block(name, samples, keys, numbers, record)


def write_tails(
    job: Job, work: Workplace, name: str, blocks: Mapping[str, dict[str, Any]], *, source: int
) -> dict[str, Any]:
    """Write the tokens left over at the ends of the blocks of one source, in their order, as one more block."""
    tails = [record["tail"] for block, record in blocks.items() if not job.sampling or job.source(block) == source]
    return write_block(job, work, name, tails, {}, source=source)
