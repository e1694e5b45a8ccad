"""Our shards read without our package: a tar of arrays, and a manifest with a line of JSON for each tar.

python examples/read_shards.py shards/manifest.jsonl
"""

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def samples(manifest: Path) -> Iterator[np.ndarray]:
    """The token ids of every sample, in the order of the manifest; `seq_len + 1` each."""
    for line in manifest.read_text().splitlines():
        row = json.loads(line)
        count = 0
        with tarfile.open(manifest.parent / f"{row['shard']}.tar") as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content and member.name.endswith(".npy"):
                    yield np.load(io.BytesIO(content.read()))
                    count += 1
        assert count == row["num_sequences"], f"{row['shard']}: {count} samples, the manifest says otherwise"


def main(manifest: Path) -> tuple[int, int]:
    """The numbers of samples and tokens."""
    lengths = [len(tokens) for tokens in samples(manifest)]
    return len(lengths), sum(lengths)


if __name__ == "__main__":
    print("{} samples, {} tokens".format(*main(Path(sys.argv[1]))))
