"""Preprocessing jobs: everything their output depends on, and the folder of unfinished work."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import orjson

from open_lm import storage
from open_lm.data.formats import token_dtype
from open_lm.data.tokenizer import Tokenizer

VERSION = 2
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

    @property
    def sample_tokens(self) -> int:
        return self.seq_len + 1

    @property
    def dtype(self) -> np.dtype:
        return token_dtype(self.vocab_size)

    @property
    def tail_blocks(self) -> list[str]:
        """Names of the blocks made of the tokens left over in the others: one for each source."""
        return [f"{TAILS}-{number:04d}" for number in range(len(self.sampling))] or [TAILS]

    def source(self, block: str) -> int:
        """The source of one block of an input."""
        return self.source_of[file_and_block(block)[0]] if self.sampling else 0

    def to_json(self) -> bytes:
        return orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2)


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
    """How much text one block holds: 8 MiB for small corpora, up to 128 MiB so that a huge one has not too many."""
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
        """The records of finished tasks; remote ones several at a time."""
        if not storage.is_remote(self.folder):
            return [self.done(name) or {} for name in names]
        with ThreadPoolExecutor(16) as pool:
            return [record or {} for record in pool.map(self.done, names)]

    def record(self, name: str, record: dict[str, Any]) -> dict[str, Any]:
        storage.write_bytes(self.path(f"{name}.json"), orjson.dumps(record))
        return record


def block_name(file: int, block: int) -> str:
    """Names sort as the blocks stand in the corpus."""
    return f"block-{file:06d}-{block:07d}"


def file_and_block(name: str) -> tuple[int, int]:
    """The numbers in a block's name."""
    _, file, block = name.split("-")
    return int(file), int(block)
