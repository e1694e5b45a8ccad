"""`openlm export-npy`: shards to flat token arrays, which OLMo and dolma train on and `--dataset-type npy` reads."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from open_lm import storage, text
from open_lm.errors import ConfigError, DataError
from open_lm.flags import Parser, add_group, flag, read_group
from open_lm.progress import progress


@dataclass(frozen=True)
class ExportNpy:
    """Input and output"""

    input: str = flag("", "Manifest of the shards, or urls of them as --train-data takes them.")
    output_dir: str = flag("", "Folder or url; gets one .npy and one .csv.gz for each shard.")
    vocab_size: int = flag(50432, "Ids at or above it are errors; up to 65536 the arrays are uint16, else uint32.")
    eot_id: int = flag(0, "Id that ends a document, for the .csv.gz.")

    def __post_init__(self) -> None:
        if not self.input or not self.output_dir:
            raise ConfigError(f"{'--output-dir' if self.input else '--input'}: not given. See --help.")
        if not 0 <= self.eot_id < self.vocab_size:
            raise ConfigError(f"--eot-id {self.eot_id}: is outside a vocabulary of {self.vocab_size}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the arrays; how many tokens they hold.

    Raises:
        DataError: a shard is damaged or holds an id outside the vocabulary.
    """
    parser = Parser(description=__doc__)
    add_group(parser, ExportNpy)
    flags = read_group(parser.parse_args(argv), ExportNpy)

    import numpy as np

    from open_lm.data.flat import documents_csv
    from open_lm.data.formats import token_dtype
    from open_lm.data.manifest import read_manifest
    from open_lm.data.shards import read_samples
    from open_lm.data.sources import open_source

    shards = read_manifest(flags.input) if flags.input.endswith(".jsonl") else open_source(flags.input).shards
    storage.require_writable(flags.output_dir, "--output-dir")
    n_tokens, n_documents = 0, 0
    for shard in progress(shards, unit="shard", label="export"):
        samples = [tokens for _, tokens in read_samples(shard.url, vocab_size=flags.vocab_size)]
        if len(samples) != shard.n_sequences:
            raise DataError(f"shard {shard.url}: {len(samples)} samples, the manifest says {shard.n_sequences}.")
        tokens = np.concatenate(samples).astype(token_dtype(flags.vocab_size))
        name = storage.join(flags.output_dir, shard.name.replace("/", "_"))
        csv = documents_csv(tokens, flags.eot_id, os.path.basename(shard.url), n_documents)
        storage.write_bytes(f"{name}.csv.gz", csv)
        storage.write_bytes(f"{name}.npy", tokens.tobytes())
        n_tokens += len(tokens)
        n_documents += int((tokens == flags.eot_id).sum()) + bool(tokens[-1] != flags.eot_id)
    print(
        f"{flags.output_dir}: {text.count(n_tokens)} tokens in {len(shards)} arrays of {token_dtype(flags.vocab_size)}"
    )
    return n_tokens
