"""Validation data: each sequence scored exactly once, spread over the ranks in equally many batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from open_lm.data.batch import IGNORED, Batch
from open_lm.data.config import DataConfig
from open_lm.data.masking import batch_of
from open_lm.data.reader import SampleReader
from open_lm.data.shard_files import open_files
from open_lm.data.sources import Opening, document_end, open_source
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
    says which targets are masked and whether attention stays inside documents, as in training.

    Raises:
        DataError: the set is empty, or a sequence cannot be read.
    """
    value = urls if isinstance(urls, str) else "::".join(urls)
    config = config or DataConfig()
    source = open_source(value, key, Opening(config, world_size=world_size))
    ends = np.cumsum([shard.n_sequences for shard in source.shards])
    n_sequences = int(ends[-1]) if max_sequences is None else min(int(ends[-1]), max_sequences)
    if n_sequences < 1:
        raise DataError(f"--val-data {source.name}: no sequences to score. Check the path and --val-num-samples.")
    end_of_text = document_end(config, [source])
    n_tokens = seq_len + 1
    reader = SampleReader(
        [source.shards],
        files=open_files([source], config, world_size),
        data_key=key,
        vocab_size=vocab_size,
        sample_tokens=n_tokens,
    )
    for start in range(rank * batch, n_sequences + rank * batch, world_size * batch):
        places = np.arange(start, min(start + batch, n_sequences))
        shard = np.searchsorted(ends, places, side="right")
        index = places - np.concatenate([[0], ends])[shard]
        rows = reader.read(np.zeros_like(places), shard, index, places)
        if rows.unreadable:
            raise DataError(f"--val-data: {rows.unreadable[0][1]} Repair the shard, or leave it out.")
        tokens = rows.tokens
        samples_BS = torch.full((batch, n_tokens), -1)
        samples_BS[: len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        found = batch_of(samples_BS, config, end_of_text)
        yield found if len(tokens) == batch else _without_rows(found, len(tokens))


def _without_rows(batch: Batch, n_filled: int) -> Batch:
    """The batch; its rows after the first `n_filled` have no targets."""
    inputs_BT, targets_BT = batch.inputs_BT.clone(), batch.targets_BT.clone()
    inputs_BT[n_filled:], targets_BT[n_filled:] = 0, IGNORED
    return replace(batch, inputs_BT=inputs_BT, targets_BT=targets_BT)
