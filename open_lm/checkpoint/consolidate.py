"""`openlm consolidate RUN`: OpenLM's files from a sharded checkpoint, on any machine."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from open_lm import storage
from open_lm.checkpoint import commit as commits
from open_lm.checkpoint.commit import Commit
from open_lm.checkpoint.read import local_shards, read_sharded
from open_lm.checkpoint.resolve import Found, Name, resolve
from open_lm.checkpoint.save_policy import SaveKind
from open_lm.checkpoint.sharded import STATS, read_tensors
from open_lm.checkpoint.snapshot import Snapshot
from open_lm.checkpoint.tree import EXTRA_STATE, nested
from open_lm.errors import CheckpointError, ConfigError
from open_lm.weights.file import clean_state_dict, load_file

HEAD = ("epoch", "name", "step", "tokens")
EXTRA = (*HEAD, "config", "values", "scaler")
"""Keys of stats.pt in a folder of shards that stats_K.pt does not have."""


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
    found = resolve(arguments.path, "all")
    if found.kind != "shards":
        raise ConfigError(f"{arguments.path}: {found.path} is one file of weights already: use or copy it.")
    if arguments.out:
        write_weights(arguments.out, read_sharded(found))
        logging.info("wrote %s", arguments.out)
        return
    commit = consolidate(found)
    logging.info("wrote %s", ", ".join(name for name in commit.files if "/" not in name))


def write_weights(out: str, content: dict[str, Any]) -> None:
    """Write the weights, in the format that the name `out` ends in: safetensors, or as torch.save does."""
    if not out.endswith(".safetensors"):
        commits.save_file(storage.parent(out), out.rpartition("/")[2], content)
        return
    from safetensors.torch import save

    named = {name: tensor.contiguous() for name, tensor in clean_state_dict(content).items()}
    storage.write_bytes(out, save(named, metadata={"format": "pt"}))


def consolidate(name: Name) -> Commit:
    """Write the consolidated files beside a folder of shards; both then belong to the checkpoint.

    Raises:
        CheckpointError: the folder is damaged, has no commit file, or one of a newer program.
        StorageError: there is no space for the files.
    """
    found = resolve(name, "all")
    before = found.commit
    if before is None:
        raise CheckpointError(f"{found.name}: it has no commit file. Use another checkpoint.")
    if before.is_newer:  # its commit file would lose what means nothing here
        raise CheckpointError(
            f"{found.name}: a newer OpenLM wrote it. Consolidate it with that, or take the weights alone with --out."
        )
    snapshot, run_name, config = snapshot_of(found, before)
    payloads = snapshot.payloads(run_name, {"config": config})
    files = {file: commits.save_file(found.folder, file, payload) for file, payload in payloads.items()}
    after = Commit(before.label, before.step, before.files | files, before.facts)
    commits.publish(found.folder, after)
    return after


def snapshot_of(found: Found, commit: Commit) -> tuple[Snapshot, str, dict[str, Any]]:
    """The whole state in a folder of shards, the run's name and its config."""
    with local_shards(found) as folder:
        stats, tensors = load_file(str(folder / STATS)), read_tensors(folder)
    tree = {"weights": {}, EXTRA_STATE: {}, **nested(tensors | stats["values"])}
    kind: SaveKind = commit.facts.get("kind", "interval")
    plain = {key: value for key, value in stats.items() if key not in EXTRA}
    snapshot = Snapshot(commit.label, kind, commit.step, stats["tokens"], tree, stats["scaler"], plain)
    return snapshot, stats["name"], stats["config"]


if __name__ == "__main__":
    from open_lm.command import run

    run(main)
