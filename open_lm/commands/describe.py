"""`openlm describe`: what a checkpoint says of itself, or what an architecture costs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

HELP = """usage: openlm describe CHECKPOINT
       openlm describe --model NAME [--markdown | --json]
       openlm describe --all [--markdown | --json]

  CHECKPOINT   A run folder (its newest checkpoint) or a weights file: its step, tokens, flags and files, as JSON.
  --model      An architecture's name or JSON file: parameters, FLOPs a token and training memory, without building it.
  --all        Those of every architecture there is."""


def main(argv: Sequence[str] | None = None) -> None:
    """Describe the checkpoint that is named, else the architecture of the flags."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or {"-h", "--help"} & set(argv):
        print(HELP)
    elif not argv[0].startswith("-"):
        from open_lm.checkpoint.describe import main as describe_checkpoint

        describe_checkpoint(argv)
    else:
        from open_lm.model.describe import main as describe_model

        describe_model(argv)
