"""Benchmark evaluation of checkpoints: an LLM Foundry YAML in; results.json, .csv, .md and a table out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from open_lm.command import run
from open_lm.evaluate.flags import EvalConfig
from open_lm.flags import Parser, add_group, read_group
from open_lm.model.config import ModelFlags


def main(argv: Sequence[str] | None = None) -> Any:
    """Evaluate every checkpoint on every task, and return the results."""
    parser = Parser(prog="eval_openlm_ckpt.py", description=__doc__)
    add_group(parser, EvalConfig)
    add_group(parser, ModelFlags)
    args = parser.parse_args(argv)
    config, flags = read_group(args, EvalConfig), read_group(args, ModelFlags)

    from open_lm.evaluate.command import evaluate

    return evaluate(config, flags)


if __name__ == "__main__":
    run(main)
