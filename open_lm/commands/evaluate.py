"""`openlm evaluate`: benchmark tasks of an LLM Foundry YAML in; results.json, .csv, .md and a table out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from open_lm.evaluate.flags import EvalConfig
from open_lm.flags import Parser, add_group, read_group
from open_lm.model.config import ModelFlags


def main(argv: Sequence[str] | None = None) -> Any:
    """Evaluate every checkpoint on every task, and return the results."""
    parser = Parser(description=__doc__)
    add_group(parser, EvalConfig)
    add_group(parser, ModelFlags)
    args = parser.parse_args(argv)
    config, flags = read_group(args, EvalConfig), read_group(args, ModelFlags)

    from open_lm.evaluate.command import evaluate

    return evaluate(config, flags)
