"""`python -m open_lm.checkpoint.consolidate RUN`: OpenLM's files from a sharded checkpoint, on any machine."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from open_lm import storage
from open_lm.checkpoint import commit as commits
from open_lm.checkpoint.commit import Commit, commit_beside
from open_lm.checkpoint.read import local_shards, read_sharded
from open_lm.checkpoint.resolve import weights_file
from open_lm.checkpoint.save_policy import Kind
from open_lm.checkpoint.sharded import STATS, is_sharded, read_tensors
from open_lm.checkpoint.snapshot import Snapshot
from open_lm.checkpoint.tree import nested
from open_lm.errors import CheckpointError, ConfigError
from open_lm.weights.file import load_file

HEAD = ("epoch", "name", "step", "tokens")
EXTRA = (*HEAD, "config", "values", "scaler")
"""What stats.pt in a folder of shards holds beside what stats_K.pt does."""


def main(argv: Sequence[str] | None = None) -> None:
    """Make epoch_K.pt, optimizer_K.pt and stats_K.pt of a sharded checkpoint, or with --out the weights alone.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    parser = argparse.ArgumentParser(prog="open_lm.checkpoint.consolidate", description="Consolidate a checkpoint.")
    parser.add_argument("path", help="Folder of a run (its newest checkpoint), of shards, or an epoch_K.commit.json.")
    parser.add_argument("--out", help="Write the weights alone to this file. Without: all files, beside the shards.")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    path = weights_file(arguments.path)
    if not is_sharded(path):
        raise ConfigError(f"{arguments.path}: {path} is consolidated already.")
    if arguments.out:
        commits.save_file(storage.parent(arguments.out), arguments.out.rpartition("/")[2], read_sharded(path))
        logging.info("wrote %s", arguments.out)
        return
    commit = consolidate(path)
    logging.info("wrote %s", ", ".join(name for name in commit.files if "/" not in name))


def consolidate(path: str) -> Commit:
    """Write the consolidated files beside the folder of shards at `path`; both then belong to the checkpoint.

    Raises:
        CheckpointError: the folder is damaged or has no commit file.
        StorageError: there is no space for the files.
    """
    folder, before = storage.parent(path), commit_beside(path)
    if before is None or not commits.hashes_match(folder, before):
        raise CheckpointError(f"{path}: its files are not those that were written. Use another checkpoint.")
    snapshot, name, config = snapshot_of(path, before)
    payloads = snapshot.payloads(name, {"config": config})
    files = {name: commits.save_file(folder, name, payload) for name, payload in payloads.items()}
    after = Commit(before.label, before.step, before.files | files, before.facts)
    commits.publish(folder, after)
    return after


def snapshot_of(path: str, commit: Commit) -> tuple[Snapshot, str, dict[str, Any]]:
    """The whole state in the folder of shards at `path`, the run's name and its config."""
    with local_shards(path) as folder:
        stats, tensors = load_file(str(folder / STATS)), read_tensors(folder)
    tree = {"weights": {}, "companions": {}, **nested(tensors | stats["values"])}
    kind: Kind = commit.facts.get("kind", "interval")
    plain = {key: value for key, value in stats.items() if key not in EXTRA}
    snapshot = Snapshot(commit.label, kind, commit.step, stats["tokens"], tree, stats["scaler"], plain)
    return snapshot, stats["name"], stats["config"]


if __name__ == "__main__":
    from open_lm.command import run

    run(main)
