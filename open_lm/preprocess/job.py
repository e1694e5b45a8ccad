"""Preprocessing jobs: everything their output depends on, and the folder of unfinished work."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import numpy as np
import orjson

from open_lm import storage
from open_lm.data.formats import token_dtype
from open_lm.data.tokenizer import Tokenizer
from open_lm.errors import DataError, StorageError

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

    @property
    def sample_tokens(self) -> int:
        return self.seq_len + 1

    @property
    def sample_bytes(self) -> int:
        return self.sample_tokens * self.dtype.itemsize

    @property
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

    def to_json(self) -> bytes:
        inputs = [(storage.to_text(url), size) for url, size in self.inputs]
        facts = asdict(self) | {"inputs": inputs}
        later = {"form": SHARDS, "id_bytes": 0}  # named only when not the default: older jobs keep their fingerprint
        kept = {name: value for name, value in facts.items() if name not in later or value != later[name]}
        return orjson.dumps(kept, option=orjson.OPT_INDENT_2)

    @cached_property
    def fingerprint(self) -> str:
        """A short text that two jobs share only if they write the same."""
        return hashlib.blake2b(self.to_json(), digest_size=8).hexdigest()


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
class Workplace:
    """The folder or url that holds a job's unfinished work; whatever has its final name in it is complete."""

    folder: str

    def path(self, name: str) -> str:
        return storage.join(self.folder, name)

    def done(self, name: str) -> dict[str, Any] | None:
        """The record of a finished task, None for an unfinished one."""
        path = self.path(f"{name}.json")
        return orjson.loads(storage.read_bytes(path)) if storage.exists(path) else None

    def records(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """The records of finished tasks."""
        return [record or {} for record in self.for_each(names, self.done)]

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


def block_name(file: int, block: int) -> str:
    """Names sort as the blocks stand in the corpus."""
    return f"block-{file:06d}-{block:07d}"


def file_and_block(name: str) -> tuple[int, int]:
    """The numbers in a block's name."""
    _, file, block = name.split("-")
    return int(file), int(block)
