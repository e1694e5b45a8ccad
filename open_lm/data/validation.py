"""Validation loader: each sequence exactly once, in equally many batches on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from open_lm.data.batch import IGNORED, Batch
from open_lm.data.config import DataConfig
from open_lm.data.reader import SampleReader
from open_lm.data.sources import document_end, open_source
from open_lm.errors import DataError


def validation_batches(
    urls: str | Sequence[str],
    *,
    key: str = "auto",
    vocab_size: int,
    seq_len: int,
    batch: int,
    rank: int,
    world_size: int,
    max_sequences: int | None = None,
    config: DataConfig | None = None,
) -> Iterator[Batch]:
    """This rank's batches of `batch` sequences, in the order of the shards: together the ranks see each one once.

    Every rank gets the same number of batches; places without a sequence are rows whose targets are all IGNORED.
    `urls` is one validation set: a --val-data value (with `::`, braces, globs), or several taken as one set. `config`
    says whether attention stays inside documents.

    Raises:
        DataError: the set is empty, or a sequence cannot be read.
    """
    value = urls if isinstance(urls, str) else "::".join(urls)
    source = open_source(value, key)
    ends = np.cumsum([shard.n_sequences for shard in source.shards])
    n_sequences = int(ends[-1]) if max_sequences is None else min(int(ends[-1]), max_sequences)
    if n_sequences < 1:
        raise DataError(f"--val-data {source.name}: no sequences to score. Check the path and --val-num-samples.")
    end_of_text = document_end(config or DataConfig(), [source])
    reader = SampleReader([source.shards], data_key=key, vocab_size=vocab_size, seq_len=seq_len)
    for start in range(rank * batch, n_sequences + rank * batch, world_size * batch):
        places = np.arange(start, min(start + batch, n_sequences))
        shard = np.searchsorted(ends, places, side="right")
        index = places - np.concatenate([[0], ends])[shard]
        tokens, holes, _ = reader.read(np.zeros_like(places), shard, index, places)
        if holes:
            raise DataError(f"--val-data: {holes[0][1]} Repair the shard, or leave it out.")
        filled = _filled(torch.from_numpy(tokens).long(), batch, seq_len)
        yield filled if end_of_text is None else filled.with_documents(end_of_text)


def _filled(samples_NS: torch.Tensor, batch: int, seq_len: int) -> Batch:
    """A batch of `batch` rows, those after the samples masked."""
    inputs_BT = torch.zeros((batch, seq_len), dtype=torch.int64)
    targets_BT = torch.full((batch, seq_len), IGNORED)
    inputs_BT[: len(samples_NS)] = samples_NS[:, :-1]
    targets_BT[: len(samples_NS)] = samples_NS[:, 1:]
    return Batch(inputs_BT, targets_BT)
