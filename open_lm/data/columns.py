"""Numbers beside samples: one or a few for each sample of a data set, found by the place of the sample."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from open_lm import storage
from open_lm.data.manifest import FILENAME, read_manifest
from open_lm.data.mixture import Samples
from open_lm.data.sources import Source
from open_lm.errors import DataError


@dataclass(frozen=True)
class Column:
    """`values[source][shard]` are the numbers of one shard's samples, (samples, k)."""

    values: Sequence[Sequence[np.ndarray]]

    def rows(self, found: Samples, n_rows: int) -> np.ndarray:
        """The numbers of samples of `n_rows` rows each, one for each row: its own, or the sample's only one."""
        places = zip(found.source.tolist(), found.shard.tolist(), found.place.tolist(), strict=True)
        table = np.stack([self.values[source][shard][place] for source, shard, place in places])
        return np.broadcast_to(table, (len(table), n_rows)).reshape(-1).copy()


def column_beside(sources: Sequence[Source], name: str) -> Column | None:
    """The numbers that `name` holds beside the manifests of `sources`, in their order; 0 where a folder has none.

    None where no folder has such a file.

    Raises:
        DataError: a file holds another number of samples than the manifest beside it.
    """
    folders = {storage.parent(shard.url) for source in sources for shard in source.shards}
    found = {folder: part for folder in folders if (part := _of_folder(folder, name)) is not None}
    if not found:
        return None
    return Column(
        [
            [found.get(storage.parent(s.url), {}).get(s.url, np.zeros((s.n_sequences, 1), np.float32)) for s in part]
            for part in (source.shards for source in sources)
        ]
    )


def _of_folder(folder: str, name: str) -> dict[str, np.ndarray] | None:
    """The part of each shard, by its url."""
    url = storage.join(folder, name)
    if not storage.exists(url):
        return None
    table = np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False)
    shards = read_manifest(storage.join(folder, FILENAME))
    ends = np.cumsum([shard.n_sequences for shard in shards])
    if len(table) != ends[-1]:
        raise DataError(f"{storage.shown(url)}: {len(table)} numbers for {ends[-1]} samples. Make the data again.")
    parts = np.split(table.reshape(len(table), -1).astype(np.float32), ends[:-1])
    return {shard.url: part for shard, part in zip(shards, parts, strict=True)}
