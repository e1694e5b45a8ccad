"""`openlm describe PATH`: the facts that a checkpoint states of itself."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from open_lm import storage, text
from open_lm.checkpoint.read import read_checkpoint
from open_lm.checkpoint.resolve import resolve


def main(argv: Sequence[str] | None = None) -> None:
    """Print the facts of a checkpoint as JSON."""
    parser = argparse.ArgumentParser(prog="open_lm.checkpoint.describe", description="What a checkpoint says of itself")
    parser.add_argument("path", help="Anything that open_lm.load_model takes.")
    print(json.dumps(describe(parser.parse_args(argv).path), indent=1, default=str))


def describe(path: str) -> dict[str, Any]:
    """Path, step, tokens, config, metrics and parameters of a checkpoint, and its files if it is complete.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    found = resolve(path)
    content = read_checkpoint(found)
    commit = found.commit
    weights = content.get("state_dict", content)
    return {
        "path": storage.shown(found.path),
        **{name: value for name, value in content.items() if name != "state_dict" and not hasattr(value, "shape")},
        "files": {name: text.size(record.size_bytes) for name, record in commit.files.items()} if commit else None,
        "parameters": sum(tensor.numel() for tensor in weights.values() if hasattr(tensor, "numel")),
    }


if __name__ == "__main__":
    from open_lm.command import run

    run(main)
