"""Log-probabilities of pairs under a reference model, computed once: --reference-log-probs trains from them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from open_lm.command import run
from open_lm.errors import ConfigError
from open_lm.flags import Parser, add_group, flag, read_group


@dataclass(frozen=True)
class ReferenceLogProbs:
    """Reference log-probabilities"""

    checkpoint: str = flag("", "The reference: anything that --pretrained takes.")
    dataset_manifest: str = flag("", "Manifest of pairs (openlm prepare-chat --form pairs).")
    out: str = flag("", "File to write, .npz; it is bound to these weights and these data.")
    batch_size: int = flag(8, "Pairs computed at once.", least=1)
    device: str = flag("auto", "Where to compute; auto takes a GPU when there is one.", choices=("auto", "cpu", "cuda"))
    precision: str = flag("fp32", "Number format, as in training.", choices=("fp32", "amp_bf16", "bf16"))

    def __post_init__(self) -> None:
        for name in ("checkpoint", "dataset_manifest", "out"):
            if not getattr(self, name):
                raise ConfigError(f"--{name.replace('_', '-')}: not given. See --help.")


def main(argv: Sequence[str] | None = None) -> str:
    """Compute and write the file that the flags describe; its path."""
    parser = Parser(prog="openlm reference-log-probs", description=__doc__)
    add_group(parser, ReferenceLogProbs)
    flags = read_group(parser.parse_args(argv), ReferenceLogProbs)
    compute(flags)
    print(f"train with     --task dpo --reference-log-probs {flags.out} --pretrained {flags.checkpoint}")
    return flags.out


def compute(flags: ReferenceLogProbs) -> None:
    """As `main`, from flags.

    Raises:
        DataError: a pair cannot be read.
    """
    import numpy as np
    import torch

    from open_lm.checkpoint.load_model import load_model
    from open_lm.data.config import DataConfig
    from open_lm.data.masking import batch_of
    from open_lm.data.reader import SampleReader
    from open_lm.data.shard_files import open_files
    from open_lm.data.sources import open_sources
    from open_lm.distributed import pick_device
    from open_lm.errors import DataError
    from open_lm.post_training.log_probs import token_log_probs
    from open_lm.post_training.reference import start_weights, weights_digest, write_log_probs
    from open_lm.precision import Precision

    device = pick_device(flags.device, 0)
    precision = Precision(flags.precision, device.type)
    model = load_model(flags.checkpoint, device=str(device), dtype=precision.weight_dtype)
    data = DataConfig(dataset_manifest=(flags.dataset_manifest,), workers=0)
    (source,) = open_sources(data, form="pairs")
    seq_len = model.config.seq_len
    reader = SampleReader(
        [source.shards],
        files=open_files([source], data, 1),
        data_key="auto",
        vocab_size=model.config.vocab_size,
        sample_tokens=2 * (seq_len + 1),
    )
    found = []
    for number, shard in enumerate(source.shards):
        for start in range(0, shard.n_sequences, flags.batch_size):
            places = np.arange(start, min(start + flags.batch_size, shard.n_sequences))
            zero = np.zeros_like(places)
            tokens, unreadable, *_ = reader.read(zero, zero + number, places, places)
            if unreadable:
                raise DataError(
                    f"{unreadable[0][1]} Repair the shard; where its length is other than the model's, make pairs with "
                    f"--seqlen {seq_len}."
                )
            samples = torch.from_numpy(tokens).long().view(2 * len(places), -1)
            batch = batch_of(samples, data, None).trimmed().to(device)
            with torch.no_grad(), precision.autocast():
                sums = token_log_probs(model, batch).sum(-1)
            found.append(sums.view(-1, 2).float().cpu().numpy())
        print(f"{number + 1} of {len(source.shards)} shards", file=sys.stderr, flush=True)
    facts = {"weights": weights_digest(start_weights(flags.checkpoint)), "seq_len": seq_len}
    write_log_probs(flags.out, source.shards, np.concatenate(found), facts)


if __name__ == "__main__":
    run(main)
