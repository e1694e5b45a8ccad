"""`openlm download`: models and data sets of the Hugging Face Hub, files of benchmark tasks, Wikipedia."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

from open_lm.errors import ConfigError

KINDS = {
    "model": "A model of the Hugging Face Hub; `openlm download owner/name` is short for it.",
    "tasks": "Files of benchmark tasks, by name or for a YAML of tasks.",
    "dataset": "A data set of the Hugging Face Hub, as .jsonl.zst.",
    "wikipedia": "The newest Wikipedia of a language, as .jsonl.zst.",
}


def main(argv: Sequence[str] | None = None) -> Any:
    """Download what the first word says.

    Raises:
        ConfigError: it says none of the kinds.
    """
    kind, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if kind in ("-h", "--help"):
        listed = "\n".join(f"  {name:<10} {line}" for name, line in KINDS.items())
        print(f"usage: openlm download KIND …\n\n{listed}\n\nopenlm download KIND --help says more.")
        return None
    if "/" in kind and not kind.startswith("-"):
        kind, rest = "model", ["--model", kind, *rest]
    if kind not in KINDS:
        raise ConfigError(f"openlm download {kind}: give one of {', '.join(KINDS)}.")
    sys.argv[0] += f" {kind}"
    return importlib.import_module(f"open_lm.commands.download_{kind}").main(rest)
