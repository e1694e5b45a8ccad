"""Small data sets: shards of samples that name themselves."""

import numpy as np
import pytest

from open_lm.data.manifest import write_manifest
from open_lm.data.shards import write_shard

SEQ_LEN = 4
VOCAB = 60_000


@pytest.fixture
def data_set(tmp_path):
    """`data_set(counts, key=, name=)` writes shards; the first id of a sample is its number in the whole set."""

    def make(counts, key="npy", name="set", manifest=True, first=0):
        folder, number, rows = tmp_path / name, first, []
        folder.mkdir()
        for k, n in enumerate(counts):
            samples = np.full((n, SEQ_LEN + 1), 7, "<u2")
            samples[:, 0] = np.arange(number, number + n)
            samples[:, 1] = samples[:, 0] % 991
            with open(folder / f"{k:08d}.tar", "wb") as file:
                write_shard(file, samples, key)
            rows.append({"shard": f"{k:08d}", "num_sequences": n})
            number += n
        if manifest:
            write_manifest(str(folder / "manifest.jsonl"), rows)
        return folder

    return make
