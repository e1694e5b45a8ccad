"""`openlm`: one command for everything; the first word says what."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_lm.command import run
from open_lm.errors import ConfigError

PACKAGE = Path(__file__).parents[1]
COMMANDS = {
    "Text to shards": {
        "prepare": ("open_lm.commands.prepare", "Text to shards of tokens, on this machine."),
        "prepare-chat": ("open_lm.commands.prepare_chat", "Conversations to shards for instruction tuning."),
        "reference-log-probs": (
            "open_lm.post_training.reference_log_probs",
            "Log-probabilities of preference pairs under a reference.",
        ),
        "prepare-ray": ("open_lm.commands.prepare_ray", "Text to shards on a Ray cluster."),
        "tokenizer": ("open_lm.commands.tokenizer", "Train a tokenizer."),
        "download": ("open_lm.commands.download", "Models and data sets of the Hub, benchmark files, Wikipedia."),
        "corpus": ("open_lm.commands.corpus", "Collect text that this machine has already."),
        "inspect": ("open_lm.data.inspect", "Show and verify shards; the samples of a training step."),
        "manifest": ("open_lm.utils.make_wds_manifest", "Write the manifest of a folder of shards."),
        "export-npy": ("open_lm.commands.export_npy", "Shards to flat arrays of tokens."),
    },
    "Shards to weights": {
        "train": ("open_lm.commands.train", "Train a model, or measure the loss of checkpoints."),
        "ladder": ("open_lm.ladder.__main__", "Train and compare a ladder of model sizes."),
        "plot": ("open_lm.commands.plot", "Loss, learning rate and throughput of several runs in one picture."),
        "report": ("open_lm.commands.report", "A run on one HTML page."),
        "compare-losses": ("open_lm.commands.compare_losses", "The first step where two runs differ."),
        "compare-traces": ("open_lm.commands.compare_traces", "The first module where two runs differ."),
    },
    "Weights to scores, text and other formats": {
        "evaluate": ("open_lm.commands.evaluate", "Score checkpoints on benchmark tasks."),
        "interpolate": ("open_lm.commands.interpolate", "Losses along the line between two checkpoints."),
        "plot-scores": ("open_lm.commands.plot_scores", "Draw scores of several checkpoints."),
        "adapter": (
            "open_lm.post_training.convert_adapter",
            "A run's adapter to PEFT's format, or PEFT's into weights.",
        ),
        "generate": ("open_lm.commands.generate", "Continue prompts."),
        "serve": ("open_lm.serve.__main__", "Answer requests over HTTP."),
        "describe": ("open_lm.commands.describe", "What a checkpoint holds, or what an architecture costs."),
        "consolidate": ("open_lm.commands.consolidate", "One file of weights from a sharded checkpoint."),
        "compare-checkpoints": ("open_lm.commands.compare_checkpoints", "The first parameter that differs."),
        "export": ("open_lm.hf.export", "A checkpoint to a folder for transformers."),
        "import": ("open_lm.hf.import_", "A model of transformers to a checkpoint."),
        "to-openlm": ("open_lm.utils.to_openlm", "A checkpoint to a file for the earlier OpenLM."),
        "convert-llama": ("open_lm.commands.convert_llama", "Llama's original weights to a checkpoint."),
    },
}
"""By stage: name, module whose `main(argv)` it is, and a line of help."""


def available() -> dict[str, dict[str, tuple[str, str]]]:
    """The commands whose module is there."""
    return {
        stage: {name: entry for name, entry in names.items() if (PACKAGE / f"{entry[0].replace('.', '/')}.py").exists()}
        for stage, names in COMMANDS.items()
    }


def usage() -> str:
    """The list of commands."""
    stages = [
        f"{stage}:\n" + "\n".join(f"  {name:<20} {line}" for name, (_, line) in names.items())
        for stage, names in available().items()
    ]
    return "\n\n".join(["usage: openlm COMMAND …", *stages, "openlm COMMAND --help says more."])


def call(argv: Sequence[str]) -> Any:
    """Run the command that the first word names, with the others.

    Raises:
        ConfigError: there is no such command.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return None
    if argv[0] == "--version":
        from open_lm import __version__

        print(f"openlm {__version__}")
        return None
    modules = {name: module for names in available().values() for name, (module, _) in names.items()}
    if argv[0] not in modules:
        near = difflib.get_close_matches(argv[0], modules, n=1)
        raise ConfigError(f"openlm {argv[0]}: no such command{f'; {near[0]}?' if near else ''}. See openlm --help.")
    sys.argv = [f"openlm {argv[0]}", *argv[1:]]
    return importlib.import_module(modules[argv[0]]).main(list(argv[1:]))


def main() -> None:
    """The console script."""
    run(lambda: call(sys.argv[1:]))


if __name__ == "__main__":
    main()
