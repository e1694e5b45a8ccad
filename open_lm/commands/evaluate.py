"""`openlm evaluate`: benchmark tasks of an LLM Foundry YAML in; results.json, .csv, .md and a table out.
With --reward a reward model scores files of conversations or pairs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from open_lm.errors import ConfigError
from open_lm.evaluate.flags import DEFAULT_OUTPUT, EvalConfig
from open_lm.flags import Parser, add_group, read_group
from open_lm.model.config import ModelFlags
from open_lm.post_training.score_config import RewardScoring


def main(argv: Sequence[str] | None = None) -> Any:
    """Evaluate every checkpoint on every task, and return the results."""
    parser = Parser(description=__doc__)
    add_group(parser, EvalConfig)
    add_group(parser, ModelFlags)
    add_group(parser, RewardScoring)
    args = parser.parse_args(argv)
    scoring = read_group(args, RewardScoring)
    if scoring.reward is not None:
        return score(scoring, args)
    config, flags = read_group(args, EvalConfig), read_group(args, ModelFlags)

    from open_lm.evaluate.command import evaluate

    return evaluate(config, flags)


def score(scoring: RewardScoring, args: Namespace) -> dict[str, Any]:
    """Score files with a reward model; the summary of the rewards."""
    from open_lm.post_training.score_files import score_files, shown

    if args.checkpoint or args.eval_yaml:
        raise ConfigError("--reward scores --input-files in place of tasks: leave out --checkpoint and --eval-yaml.")
    folder = args.output_dir or DEFAULT_OUTPUT
    summary = score_files(scoring, args.tokenizer, folder, args.device)
    print(f"{shown(summary)}\nwritten: {folder}/rewards.jsonl, rewards.json", flush=True)
    return summary
