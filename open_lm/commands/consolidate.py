"""`openlm consolidate`: one file of weights from a sharded checkpoint, on any machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence

HELP = """usage: openlm consolidate PATH [--out FILE]

  PATH    Folder of a run (its newest checkpoint), of shards, or an epoch_K.commit.json.
  --out   Write the weights alone to this file. Without: all files, beside the shards."""


def main(argv: Sequence[str] | None = None) -> None:
    """Consolidate the checkpoint that is named."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or {"-h", "--help"} & set(argv):
        print(HELP)
        return
    from open_lm.checkpoint.consolidate import main as consolidate

    consolidate(argv)
