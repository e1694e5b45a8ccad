"""`openlm evaluate`: benchmark tasks of an LLM Foundry YAML in; results.json, .csv, .md and a table out.
With --reward, rewards of conversations and pairs in files, or of the answers that a checkpoint gives to prompts."""

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
    if scoring.reward:
        return score(scoring, args)
    config, flags = read_group(args, EvalConfig), read_group(args, ModelFlags)

    from open_lm.evaluate.command import evaluate

    return evaluate(config, flags)


def score(scoring: RewardScoring, args: Namespace) -> dict[str, Any]:
    """Score files, or a checkpoint's answers to prompts; the summary of the rewards."""
    from open_lm.post_training import score_answers, score_files

    if args.eval_yaml or args.tasks:
        raise ConfigError("--reward scores in place of tasks: leave out --eval-yaml and --tasks.")
    folder = args.output_dir or DEFAULT_OUTPUT
    if scoring.prompts is None:
        if args.checkpoint:
            raise ConfigError("--input-files are scored by --reward alone: leave out --checkpoint.")
        summary = score_files.score_files(scoring, args.tokenizer, folder, args.device)
        print(score_files.shown(summary))
    else:
        if len(args.checkpoint) != 1:
            raise ConfigError(f"--prompts are answered by one --checkpoint, {len(args.checkpoint)} are given.")
        summary = score_answers.score_answers(scoring, args.checkpoint[0], args.tokenizer, folder, args.device)
        print(score_answers.shown(summary))
    print(f"written: {folder}/rewards.jsonl, rewards.json", flush=True)
    return summary
