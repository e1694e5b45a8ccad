"""Preprocessing jobs: everything their output depends on, their tasks, and the folder of unfinished work."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, TypeVar

import numpy as np
import orjson

from open_lm import storage
from open_lm.data.formats import token_dtype
from open_lm.data.shards import write_shard
from open_lm.data.tokenizer import Tokenizer
from open_lm.errors import DataError, StorageError
from open_lm.preprocess.jsonl import WHOLE, is_packed

T = TypeVar("T")
U = TypeVar("U")

VERSION = 3
SHARDS, FLAT = "webdataset", "npy-flat"
TAILS = "tails"
"""Name of the block made of the tokens left over in the others."""


@dataclass(frozen=True)
class Job:
    """All that decides what is written, byte for byte. `inputs` are (url, size in bytes).

    `sampling` are (source, how often its samples are written), empty for once each; `source_of` is the source of each
    input.
    """

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
    sampling: tuple[tuple[str, float], ...] = ()
    source_of: tuple[int, ...] = ()
    shuffle: bool = True
    version: int = VERSION
    form: str = SHARDS
    id_bytes: int = 0
    """Of an id on disk; 0: as few as the vocabulary needs."""

    @cached_property
    def sample_tokens(self) -> int:
        return self.seq_len + 1

    @cached_property
    def sample_bytes(self) -> int:
        return self.sample_tokens * self.dtype.itemsize

    @cached_property
    def dtype(self) -> np.dtype:
        return np.dtype(f"<u{self.id_bytes}") if self.id_bytes else token_dtype(self.vocab_size)

    @property
    def tail_blocks(self) -> list[str]:
        """Names of the blocks made of the tokens left over in the others: one for each source."""
        return [f"{TAILS}-{number:04d}" for number in range(len(self.sampling))] or [TAILS]

    def source_of_file(self, file: int) -> int:
        """The source of an input."""
        return self.source_of[file] if self.sampling else 0

    def source(self, block: str) -> int:
        """The source of one block of an input."""
        return self.source_of_file(file_and_block(block)[0])

    @cached_property
    def json(self) -> bytes:
        """The job as its file holds it."""
        inputs = [(storage.to_text(url), size) for url, size in self.inputs]
        facts = asdict(self) | {"inputs": inputs}
        later = {"form": SHARDS, "id_bytes": 0}  # named only when not the default: older jobs keep their fingerprint
        kept = {name: value for name, value in facts.items() if name not in later or value != later[name]}
        return orjson.dumps(kept, option=orjson.OPT_INDENT_2)

    @cached_property
    def fingerprint(self) -> str:
        """A short text that two jobs share only if they write the same."""
        return hashlib.blake2b(self.json, digest_size=8).hexdigest()


def make_job(urls: Sequence[str], tokenizer: Tokenizer, **settings: Any) -> Job:
    """The job of making a data set of the raw files `urls`; `settings` are what these and `tokenizer` do not say."""
    with ThreadPoolExecutor(16) as pool:
        inputs = tuple(zip(urls, pool.map(storage.size_bytes, urls), strict=True))
    facts: dict[str, Any] = {
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eot_token": str(tokenizer.token_of(tokenizer.eot_id)),
        "eot_id": tokenizer.eot_id,
        "block_bytes": choose_block_bytes(sum(size for _, size in inputs)),
    }
    return Job(inputs=inputs, **(facts | settings))


def choose_block_bytes(total_bytes: int) -> int:
    """Bytes of text in one block: 8 MiB for small corpora, up to 128 MiB so that a huge one has not too many."""
    return max(8 << 20, min(128 << 20, total_bytes >> 8))


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
        modulus = 1 if url.endswith(WHOLE) else modulus
        tasks += [TextTask(file, file, residue, modulus) for residue in range(modulus)]
    return [*tasks, TextTask(group[0], group[-1])] if group else tasks


@dataclass(frozen=True)
class Workplace:
    """The folder or url that holds a job's unfinished work; whatever has its final name in it is complete."""

    folder: str

    def path(self, name: str) -> str:
        return storage.join(self.folder, name)

    def done(self, name: str) -> dict[str, Any] | None:
        """The record of a finished task, None for an unfinished one."""
        path = self.path(f"{name}.json")
        return orjson.loads(storage.read_bytes(path)) if storage.exists(path) else None

    def for_each(self, items: Sequence[T], look: Callable[[T], U]) -> list[U]:
        """`look` at each; in a remote folder several at a time."""
        if not storage.is_remote(self.folder):
            return [look(item) for item in items]
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(look, items))

    def sound_block(self, name: str, job: Job) -> dict[str, Any] | None:
        """The record of a finished block whose files are all there, None where it must be made (again)."""
        record = self.done(name)
        if record is None:
            return None
        sizes = {"bin": record["samples"] * (8 + job.sample_bytes)}
        if job.form == FLAT:
            sizes = {"bin": record["tokens"] * job.dtype.itemsize, "docs": record["docs_bytes"]}
        try:
            whole = all(storage.size_bytes(self.path(f"{name}.{end}")) == size for end, size in sizes.items())
        except StorageError:
            return None
        return record if whole else None

    def sound_shard(self, name: str, target: str) -> dict[str, Any] | None:
        """The manifest's row of a shard that is in `target`, whole; None where it must be written (again)."""
        done = self.done(f"shard-{name}")
        if done is None:
            return None
        try:
            return done if storage.size_bytes(storage.join(target, f"{name}.tar")) == done["bytes"] else None
        except StorageError:
            return None

    def blocks_of(self, tasks: Sequence[TextTask], job: Job) -> tuple[dict[str, dict[str, Any]], dict[TextTask, str]]:
        """The records of the blocks that `tasks` made, in the order of the corpus; and the tasks that are not finished,
        with what is not there of each."""
        blocks: dict[str, dict[str, Any]] = {}
        lost: dict[TextTask, str] = {}
        for task, found in zip(tasks, self.for_each(tasks, partial(self._blocks_of, job)), strict=True):
            if isinstance(found, str):
                lost[task] = found
            else:
                blocks |= found
        return dict(sorted(blocks.items())), lost

    def _blocks_of(self, job: Job, task: TextTask) -> dict[str, dict[str, Any]] | str:
        """The records of a task's blocks, or the name of what is not there."""
        done = self.done(task.name)
        if done is None:
            return task.name
        blocks: dict[str, dict[str, Any]] = {}
        for name in done["blocks"]:
            record = self.sound_block(name, job)
            if record is None:
                return name
            if "tail" in record:
                record["tail"] = np.array(record["tail"], job.dtype)
            blocks[name] = record
        return blocks

    def write_block(
        self,
        name: str,
        samples: np.ndarray,
        keys: np.ndarray,
        numbers: np.ndarray | None,
        record: dict[str, Any],
    ) -> dict[str, Any]:
        """Write a block's samples, sorted as in `write_sorted`, then its record."""
        path, record_path = self.path(f"{name}.bin"), self.path(f"{name}.json")
        write_sorted(path, samples, keys, numbers)
        storage.write_bytes(record_path, orjson.dumps(record))
        return record

    def write_shard(self, job: Job, name: str, target: str, samples: np.ndarray, *, first_number: int) -> int:
        """Write a shard into `target`, then its row of the manifest as its record; the bytes written."""
        record_path = self.path(f"shard-{name}.json")
        with storage.open_atomic(storage.join(target, f"{name}.tar")) as file:
            written = write_shard(file, samples, job.data_key, first_number=first_number)
        row = {
            "shard": name,
            "num_sequences": len(samples),
            "bytes": written.size_bytes,
            "crc32": f"{written.crc32:08x}",
            "first_key": f"{first_number:012d}",
            "last_key": f"{first_number + len(samples) - 1:012d}",
            "seq_len": job.seq_len,
            "data_key": job.data_key,
            "tokenizer": job.tokenizer,
            "eot_id": job.eot_id,
        }
        storage.write_bytes(record_path, orjson.dumps(row | ({"layout": written.layout} if written.layout else {})))
        return written.size_bytes

    def record(self, name: str, record: dict[str, Any]) -> dict[str, Any]:
        storage.write_bytes(self.path(f"{name}.json"), orjson.dumps(record))
        return record


@lru_cache(maxsize=2)
def load_job(folder: str, fingerprint: str) -> Job:
    """The job whose unfinished work lies in `folder`: tasks carry only its fingerprint.

    Raises:
        DataError: another job lies there.
    """
    row = orjson.loads(storage.read_bytes(storage.join(folder, "job.json")))
    pairs = {name: tuple(map(tuple, row[name])) for name in ("inputs", "sampling")}
    pairs["inputs"] = tuple((storage.from_text(url), size) for url, size in pairs["inputs"])
    job = Job(**(row | pairs | {"source_of": tuple(row["source_of"])}))
    if job.fingerprint != fingerprint:
        raise DataError(f"{folder}: holds another job. Is another process at work there?")
    return job


def write_sorted(path: str, samples: np.ndarray, keys: np.ndarray, numbers: np.ndarray | None = None) -> None:
    """One file: the keys in order, then the samples in that order. `numbers` says which sample each key is of."""
    order = np.argsort(keys, kind="stable")
    rows = order if numbers is None else numbers[order]
    with storage.open_atomic(path) as file:
        file.write(keys[order].tobytes())
        for start in range(0, len(rows), 4096):
            file.write(samples[rows[start : start + 4096]].tobytes())


def block_name(file: int, block: int) -> str:
    """Names sort as the blocks stand in the corpus."""
    return f"block-{file:06d}-{block:07d}"


def file_and_block(name: str) -> tuple[int, int]:
    """The numbers in a block's name."""
    _, file, block = name.split("-")
    return int(file), int(block)
