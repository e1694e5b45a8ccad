"""docs/flags.md, generated from the training command's flags (`make flags`)."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from open_lm.params import GROUPS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "flags.md"


def page() -> str:
    """The page: one table a group, in the order of --help."""
    tables = "\n".join(_table(group) for group in GROUPS.values())
    return (
        "# The flags of `open_lm.main`\n\n"
        "Made by `make flags` from the declarations in the code, which `--help` prints too. `--config FILE` takes the\n"
        "same names from YAML or JSON, with dashes or underscores; the command line wins. A flag that is on by\n"
        f"default is switched off with `--no-` before its name.\n\n{tables}"
    )


def _table(group: type) -> str:
    rows = [_row(f) for f in fields(group) if "help" in f.metadata]
    head = f"## {(group.__doc__ or '').splitlines()[0]}\n\n| flag | default | |\n|---|---|---|\n"
    return head + "\n".join(rows) + "\n"


def _row(field: Any) -> str:
    names = ", ".join(f"`{name}`" for name in ("--" + field.name.replace("_", "-"), *field.metadata["aliases"]))
    default = "" if field.default in (None, (), "", False) else f"`{_spelled(field.default)}`"
    choices = field.metadata["choices"]
    among = f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
    text = (field.metadata["help"] + among).replace("|", "\\|")
    return f"| {names} | {default} | {text} |"


def _spelled(value: Any) -> str:
    return "on" if value is True else str(value)


if __name__ == "__main__":
    PAGE.write_text(page())
    print("written: docs/flags.md")
