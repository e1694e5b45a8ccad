"""Restoring a run from --resume, --pretrained or --average, identically on every rank."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

from open_lm import storage
from open_lm.checkpoint import commit as commits
from open_lm.checkpoint.manager import Checkpoints, DataOrder
from open_lm.checkpoint.mean import read_mean
from open_lm.checkpoint.read import local_shards, read_checkpoint
from open_lm.checkpoint.resolve import latest, weights_file
from open_lm.checkpoint.sharded import STATS, is_sharded, load_into, read_index
from open_lm.checkpoint.snapshot import Saved, in_file_order, live
from open_lm.checkpoint.state_dicts import (
    by_name,
    load_optimizers,
    load_weights,
    require_same_architecture,
    require_same_experts,
    spread_tensors,
)
from open_lm.checkpoint.tree import SEPARATOR, flat, nested
from open_lm.errors import CheckpointError
from open_lm.model.lora import is_addition
from open_lm.train.row_order import RowOrder, copy_from_file_order, order_of, row_orders
from open_lm.weights.file import clean_state_dict, load_file, named_weights, plain_name
from open_lm.weights.hub import is_hub

Use = Literal["evaluate", "weights", "state", "resume"]
"""What is taken of a checkpoint: the weights to evaluate them; the weights to start from; optimizer, step and the rest
too; all that and the data where they stood."""


@dataclass
class Stored:
    """What a checkpoint of consolidated files holds; the tensors are there on rank 0 only."""

    weights: dict[str, Any] = field(default_factory=dict)
    names: Mapping[str, Any] = field(default_factory=dict)
    """The weights as the file names them, which may not be as we do."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    companions: dict[str, dict[str, Any]] = field(default_factory=dict)


def restore(checkpoints: Checkpoints, state: Saved, loader: DataOrder | None) -> None:
    """Continue from the checkpoint of --resume, or start from --pretrained or --average; evaluate without `loader`.

    Raises:
        CheckpointError: it is missing or damaged, or of another model, optimizer, batch or data; on all ranks alike.
    """
    flags = checkpoints.flags
    if not (flags.resume or flags.start):
        return
    stored = Stored()
    facts = state.world.on_rank0(lambda: _read(stored, checkpoints, state, trains=loader is not None))
    if facts is None:
        if loader is None:
            raise CheckpointError(f"--resume latest: no checkpoint in {checkpoints.folder} to evaluate.")
        logging.info("no checkpoint in %s yet: starting at step 0", checkpoints.folder)
        return
    use: Use = facts["use"]
    if facts["sharded"]:
        _load_sharded(facts, state, whole_state=use in ("state", "resume"))
    else:
        _load_consolidated(stored, facts, state, whole_state=use in ("state", "resume"))
    if use == "weights":
        for part in state.companions.values():
            part.reset()
        logging.info("starting from the weights of %s", facts["path"])
        return
    state.step, state.tokens = facts["step"], facts["tokens"]
    if use != "evaluate":
        state.precision.load_state_dict(facts["scaler"])
    if use == "resume" and loader is not None:
        if facts["data_state"] is not None:
            loader.check_state(facts["data_state"])
        state.world.on_rank0(lambda: _set_aside_later(checkpoints.folder, state.step))
    logging.info("resumed from %s at step %d", facts["path"], state.step)


def _load_consolidated(stored: Stored, facts: Mapping[str, Any], state: Saved, *, whole_state: bool) -> None:
    broadcast, orders = state.world.size > 1, row_orders(state.model)
    for part in (stored.weights, stored.optimizer, stored.companions) if orders else ():
        _put_in_memory_order(part, orders)
    load_weights(state.model, stored.weights, facts["path"], broadcast=broadcast)
    if whole_state:
        load_optimizers(state.model, state.optimizers, stored.optimizer, broadcast=broadcast)
        for name, part in _saved_companions(state, facts):
            part.load_state_dict(spread_tensors(stored.companions.get(name), part.state_dict()))


def _load_sharded(facts: Mapping[str, Any], state: Saved, *, whole_state: bool) -> None:
    """Every rank reads its own part, in place."""
    held_tree = live(state)
    tree = in_file_order(held_tree, state.model)
    parts: dict[str, Any] = {"weights": tree["weights"]}
    if whole_state:
        parts |= {"optimizer": {"state": tree["optimizer"]["state"]}, "companions": {}}
        for name, _ in _saved_companions(state, facts):
            parts["companions"][name] = tree["companions"][name]
    tensors, _ = flat(parts)
    with local_shards(facts["path"]) as folder:
        held = {name for name in read_index(folder).state_dict_metadata if name.startswith(f"weights{SEPARATOR}")}
        if not whole_state:  # a base model has no adapters; they stay as they are here
            tensors = {name: t for name, t in tensors.items() if name in held or not is_addition(_bare(name))}
        if held != {name for name in tensors if name.startswith(f"weights{SEPARATOR}")}:
            raise CheckpointError(f"{facts['path']} is of another model. Give the --model it was trained with.")
        load_into(folder, tensors, alone=state.world.size == 1)
    _copy_ordered(tensors, flat(held_tree)[0], row_orders(state.model))
    tree = held_tree
    if not whole_state:
        return
    values = nested(facts["values"])
    if plain := values.get("optimizer", {}).get("state"):
        for name, moments in plain.items():
            tree["optimizer"]["state"][name] |= moments
        set_optimizer_state_dict(state.model, state.optimizers, tree["optimizer"])
    for name, part in state.companions.items():
        if name in parts["companions"]:
            part.load_state_dict(tree["companions"][name] | values.get("companions", {}).get(name, {}))


def _put_in_memory_order(tree: dict[str, Any], orders: Mapping[str, RowOrder], at: str = "") -> None:
    """Order the rows of whole tensors, as files have them, for the ranks that divide the model."""
    for name, value in tree.items():
        path = f"{at}{SEPARATOR}{name}"
        if isinstance(value, dict):
            _put_in_memory_order(value, orders, path)
        elif isinstance(value, Tensor) and (order := order_of(path, value, orders)):
            tree[name] = order.in_memory(value)


def _copy_ordered(stored: Mapping[str, Tensor], held: Mapping[str, Tensor], orders: Mapping[str, RowOrder]) -> None:
    """Copy what was loaded in the order of files to the tensors of the run, which have another."""
    for path, tensor in stored.items():
        order = order_of(path, tensor, orders)
        if order is not None:
            copy_from_file_order(tensor, held[path], order)


def _bare(path: str) -> str:
    return plain_name(path.removeprefix(f"weights{SEPARATOR}"))


def _saved_companions(state: Saved, facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The companions that the checkpoint holds something of; the others begin anew."""
    for name, part in state.companions.items():
        if name not in facts["companions"]:
            logging.warning("%s holds no %s: it begins anew here.", facts["path"], name)
            part.reset()
    return [(name, part) for name, part in state.companions.items() if name in facts["companions"]]


def _choose(checkpoints: Checkpoints, *, trains: bool) -> tuple[Use, tuple[str, ...]] | None:
    """What to take from which checkpoints; None when --resume latest finds none."""
    flags = checkpoints.flags
    resumed: Use = "resume" if trains else "evaluate"
    if flags.resume == "latest":
        found = latest(checkpoints.folder)
        if found is not None:
            return resumed, (found,)
        if not flags.start:
            return None
    elif flags.resume:
        path = weights_file(flags.resume)
        _require_undamaged(path)
        return resumed, (path,)
    started: Use = "state" if flags.load_pretrained_state else "weights"
    for path in flags.start:
        _require_undamaged(path)
    if flags.load_pretrained_state:
        return (started if trains else "evaluate"), (weights_file(flags.start[0]),)
    return started if trains else "evaluate", flags.start


def _read(stored: Stored, checkpoints: Checkpoints, state: Saved, *, trains: bool) -> dict[str, Any] | None:
    """Fill `stored` from its files; what the other ranks need to know of it, or None when there is no checkpoint."""
    choice = _choose(checkpoints, trains=trains)
    if choice is None:
        return None
    use, paths = choice
    path = paths[0] if len(paths) == 1 else f"the mean of {', '.join(paths)}"
    in_shards = len(paths) == 1 and is_sharded(weights_file_or(paths[0]))
    if in_shards:
        path = weights_file_or(paths[0])
        file = _stats_of_shards(path)
    else:
        file = read_checkpoint(path) if len(paths) == 1 else read_mean(paths, checkpoints.flags.shares)
        stored.names = named_weights(file)
        stored.weights = clean_state_dict(file, merge=use == "weights" or not _has_additions(state))
        require_same_experts(stored.names, checkpoints.config["model"], path)
    stored_config = file.get("config") or {}
    require_same_architecture(stored_config.get("model", {}), checkpoints.config["model"], path)
    facts = {
        "use": use,
        "path": path,
        "sharded": in_shards,
        "step": int(file.get("step", 0)),
        "tokens": int(file.get("tokens", 0)),
    }
    if use in ("evaluate", "weights"):
        return facts
    for name in ("optimizer", "lora_rank", "dora", "task"):
        _require_same(name, stored_config.get("flags", {}), checkpoints.config["flags"], path)
    _require_same_batch(facts, state.tokens_per_step)
    return facts | (_state_of_shards(file) if in_shards else _state_of_files(stored, path, state))


def _has_additions(state: Saved) -> bool:
    return any(is_addition(plain_name(name)) for name, _ in state.model.named_parameters())


def weights_file_or(path: str) -> str:
    """The file or folder of weights that `path` means; `path` itself where it means something else."""
    try:
        return weights_file(path)
    except CheckpointError:
        return path


def _stats_of_shards(path: str) -> dict[str, Any]:
    with local_shards(path) as folder:
        return load_file(str(folder / STATS))


def _state_of_shards(stats: Mapping[str, Any]) -> dict[str, Any]:
    values = stats["values"]
    companions = {path.split(SEPARATOR)[1] for path in values if path.startswith(f"companions{SEPARATOR}")}
    kept = {name: stats[name] for name in ("scaler", "data_state", "values")}
    return kept | {"companions": sorted(companions)}


def _state_of_files(stored: Stored, path: str, state: Saved) -> dict[str, Any]:
    optimizer, stats = (_companion(path, kind) for kind in ("optimizer", "stats"))
    stored.optimizer = by_name(optimizer["optimizer"], state.model, stored.names)
    present = [name for name in state.companions if storage.exists(_companion_path(path, name))]
    stored.companions = {name: _companion(path, name) for name in present}
    return {
        "step": int(stats["step"]),
        "scaler": optimizer.get("scaler", {}),
        "data_state": stats.get("data_state"),
        "companions": present,
    }


def _require_undamaged(path: str) -> None:
    commit = None if is_hub(path) else commits.commit_beside(path)
    if commit and not commits.hashes_match(storage.parent(path), commit):
        raise CheckpointError(
            f"{path}: its files are not those that were written. Use --resume latest, or another one."
        )


def _require_same(name: str, stored: dict[str, Any], here: dict[str, Any], path: str) -> None:
    """Refuse to continue with another optimizer, adapter or task: what one has accumulated means nothing to another."""
    before, now = stored.get(name, here.get(name)), here.get(name)
    if before != now:
        raise CheckpointError(
            f"--resume {path}: --{name.replace('_', '-')} was {before}, is now {now}. Continue with {before}, "
            "or start a new run from the weights with --pretrained."
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
