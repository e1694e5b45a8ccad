"""`openlm ladder COMMAND`: plan, train and measure a ladder of models, and fit the law that predicts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from open_lm.flags import Parser

COMMANDS: dict[str, tuple[str, str]] = {
    "init": ("init_command", "Write a ladder file."),
    "dry-run": ("commands", "Print the plan of each size and draw its learning rate."),
    "run": ("commands", "Train the sizes, or go on where they were stopped."),
    "run-benchmark": ("commands", "Measure the speed of each size over a few steps."),
    "status": ("commands", "Checkpoints and metrics found, percent trained, time left."),
    "checkpoints": ("commands", "The checkpoints that the ladder promises, and where they are."),
    "metrics": ("commands", "A table of all checkpoints with their metrics."),
    "fit": ("commands", "Fit a scaling law, with intervals and predictions."),
    "coordinate-check": ("transfer_command", "Sizes of activations over widths and depths, drawn."),
    "lr-sweep": ("transfer_command", "Losses of small models over learning rates, drawn."),
    "plot": ("commands", "Draw learning rates, or losses of a sweep of learning rates over sizes."),
}


def usage() -> str:
    """The commands, one a line."""
    lines = "\n".join(f"  {name:<16} {summary}" for name, (_, summary) in COMMANDS.items())
    return f"usage: openlm ladder COMMAND [flags]\n\n{lines}\n\nCOMMAND --help lists its flags."


def main(argv: Sequence[str] | None = None) -> Any:
    """Run one command of the ladder.

    Raises:
        OpenLMError: a flag, the ladder file, a run or a fit went wrong; the message says what to do.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return None
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        Parser(prog="openlm ladder").error(f"no command {name!r}: choose of {', '.join(COMMANDS)}")
    return _function(name)(rest)


def _function(name: str) -> Callable[[list[str]], Any]:
    from importlib import import_module

    module = import_module(f"open_lm.ladder.{COMMANDS[name][0]}")
    function: Callable[[list[str]], Any] = getattr(module, name.replace("-", "_"))
    return function


if __name__ == "__main__":
    from open_lm.command import run

    run(main)
