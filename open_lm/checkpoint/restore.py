"""From where a run goes on: the checkpoint that --resume or --pretrained names, the same on every rank."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from open_lm import storage
from open_lm.checkpoint import commit as commits
from open_lm.checkpoint.contents import (
    by_name,
    load_optimizers,
    load_weights,
    require_same_architecture,
    require_same_experts,
    spread_tensors,
)
from open_lm.checkpoint.find import latest
from open_lm.checkpoint.manager import Checkpoints, DataOrder
from open_lm.checkpoint.snapshot import Saved
from open_lm.checkpoint.sources import read_checkpoint
from open_lm.checkpoint.weights import clean_state_dict, load_file, named_weights
from open_lm.errors import CheckpointError


@dataclass
class Stored:
    """What a checkpoint holds; the tensors are there on rank 0 only."""

    path: str
    weights: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    companions: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def restore(checkpoints: Checkpoints, state: Saved, loader: DataOrder | None) -> None:
    """Continue from the checkpoint of --resume, or start from the weights of --pretrained; evaluate without `loader`.

    Raises:
        CheckpointError: it is missing or damaged, or of another model, optimizer, batch or data; on all ranks alike.
    """
    flags = checkpoints.flags
    path = flags.pretrained or flags.resume
    if path is None:
        return
    continues = flags.pretrained is None and loader is not None
    stored = Stored(path)
    facts = state.world.from_master(lambda: _read(stored, checkpoints, state, with_optimizer=continues))
    if facts is None:
        if loader is None:
            raise CheckpointError(f"--resume latest: no checkpoint in {checkpoints.folder} to evaluate.")
        logging.info("no checkpoint in %s yet: starting at step 0", checkpoints.folder)
        return
    broadcast = state.world.size > 1
    load_weights(state.model, stored.weights, facts["path"], broadcast=broadcast)
    if loader is not None and not continues:
        for part in state.companions.values():
            part.reset()
        logging.info("starting from the weights of %s", facts["path"])
        return
    state.step, state.tokens = facts["step"], facts["tokens"]
    if loader is not None:
        load_optimizers(state.model, state.optimizers, stored.optimizer, broadcast=broadcast)
        state.precision.load_state_dict(facts["scaler"])
        _restore_companions(state, stored.companions, facts)
        if facts["data_state"] is not None:
            loader.check_state(facts["data_state"])
        state.world.from_master(lambda: _set_aside_later(checkpoints.folder, state.step))
    logging.info("resumed from %s at step %d", facts["path"], state.step)


def _restore_companions(state: Saved, saved: dict[str, dict[str, Any]], facts: dict[str, Any]) -> None:
    """Set every companion of the state: to what was saved of it, or anew where the checkpoint has nothing of it."""
    for name, part in state.companions.items():
        if name in facts["companions"]:
            part.load_state_dict(spread_tensors(saved.get(name), part.state_dict()))
        else:
            logging.warning("%s holds no %s: it begins anew here.", facts["path"], name)
            part.reset()


def _read(stored: Stored, checkpoints: Checkpoints, state: Saved, *, with_optimizer: bool) -> dict[str, Any] | None:
    """Fill `stored` from its files; what the other ranks need to know of it, or None when there is no checkpoint."""
    if stored.path == "latest":
        found = latest(checkpoints.folder)
        if found is None:
            return None
        stored.path = found
    else:
        _require_undamaged(stored.path)
    file = read_checkpoint(stored.path)
    require_same_architecture(file.get("config", {}).get("model", {}), checkpoints.config["model"], stored.path)
    stored.weights = clean_state_dict(file)
    names = named_weights(file)
    require_same_experts(names, checkpoints.config["model"], stored.path)
    facts = {"path": stored.path, "step": int(file.get("step", 0)), "tokens": int(file.get("tokens", 0))}
    if not with_optimizer:
        return facts
    _require_same_rule(file.get("config", {}).get("flags", {}), checkpoints.config["flags"], stored.path)
    _require_same_batch(facts, state.tokens_per_step)
    optimizer, stats = (_companion(stored.path, kind) for kind in ("optimizer", "stats"))
    stored.optimizer = by_name(optimizer["optimizer"], state.model, names)
    present = [name for name in state.companions if storage.exists(_companion_path(stored.path, name))]
    stored.companions = {name: _companion(stored.path, name) for name in present}
    facts |= {"step": int(stats["step"]), "scaler": optimizer.get("scaler", {}), "data_state": stats.get("data_state")}
    return facts | {"companions": present}


def _require_undamaged(path: str) -> None:
    commit = commits.commit_beside(path)
    if commit and not commits.hashes_match(storage.parent(path), commit):
        raise CheckpointError(
            f"{path}: its files are not those that were written. Use --resume latest, or another one."
        )


def _require_same_rule(stored: dict[str, Any], here: dict[str, Any], path: str) -> None:
    """Refuse to continue with another optimizer: what one rule has accumulated means nothing to another."""
    before, now = stored.get("optimizer", here["optimizer"]), here["optimizer"]
    if before != now:
        raise CheckpointError(
            f"--resume {path}: --optimizer was {before}, is now {now}. Continue with {before}, or start a new run from "
            "the weights with --pretrained."
        )


def _require_same_batch(facts: dict[str, Any], tokens_per_step: int) -> None:
    """Refuse to continue with batches of another size: steps, tokens and learning rates would not add up."""
    if not facts["tokens"]:  # a file of OpenLM does not say
        facts["tokens"] = facts["step"] * tokens_per_step
    if facts["tokens"] != facts["step"] * tokens_per_step:
        raise CheckpointError(
            f"--resume {facts['path']}: a step had {facts['tokens'] // facts['step']} tokens, now {tokens_per_step}. "
            "Give the --global-batch-size and model the run began with, or start a new run with --pretrained."
        )


def _companion(path: str, kind: str) -> dict[str, Any]:
    """The optimizer, stats or other file that belongs to weights file `path`, by name in the same folder."""
    companion = _companion_path(path, kind)
    if not storage.exists(companion):
        raise CheckpointError(
            f"--resume {path}: {companion} is missing. Use --pretrained to start anew from the weights alone."
        )
    return load_file(companion)


def _companion_path(path: str, kind: str) -> str:
    folder, name = storage.parent(path), path.rpartition("/")[2]
    return storage.join(folder, name.replace("epoch_", f"{kind}_", 1))


def _set_aside_later(folder: str, step: int) -> None:
    """Let checkpoints of later steps, which this run leaves behind, no longer count; their files stay."""
    for commit in commits.committed(folder):
        if commit.step > step:
            name = commit.commit_name.replace(".commit.json", ".left-behind.json")
            logging.warning(
                "going back to step %d: checkpoint %s of step %d no longer counts (%s).",
                step,
                commit.label,
                commit.step,
                name,
            )
            commits.rename(folder, commit.commit_name, name)
