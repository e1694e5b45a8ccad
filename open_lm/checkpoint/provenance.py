"""Provenance stored in a checkpoint: program versions, git commit, tokenizer, data."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def provenance(tokenizer: str | None, data_state: Mapping[str, Any] | None) -> dict[str, Any]:
    """Plain values for a checkpoint's config: `tokenizer` (None: not known), `data` (the fingerprint of each source),
    `versions`, and `git_commit` of the checkout that runs (None: none; `+changes`: files differ from it)."""
    sources = data_state["sources"] if data_state else []
    return {
        "tokenizer": str(Path(tokenizer).resolve()) if tokenizer and Path(tokenizer).exists() else tokenizer,
        "data": {source["name"]: source["fingerprint"] for source in sources},
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "open_lm": _own_version()},
        "git_commit": git_commit(Path(__file__).resolve().parents[2]),
    }


def _own_version() -> str | None:
    try:
        return importlib.metadata.version("open_lm")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return None


def git_commit(folder: Path) -> str | None:
    """The commit checked out in `folder`, with `+changes` behind it if tracked files differ; None without git."""
    if not (folder / ".git").exists():  # the folder may lie in a repository of something else
        return None
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else commit + ("+changes" if changes else "")


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
