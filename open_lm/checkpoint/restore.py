"""Restoring a run from --resume, --pretrained or --average, identically on every rank."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

from open_lm import faults, storage
from open_lm.checkpoint.config import CheckpointConfig
from open_lm.checkpoint.latest import newest_sound
from open_lm.checkpoint.manager import Checkpoints, DataOrder
from open_lm.checkpoint.mean import read_mean
from open_lm.checkpoint.read import local_shards, read_checkpoint
from open_lm.checkpoint.resolve import Found, Verdicts, resolve
from open_lm.checkpoint.retention import labels_in, leave_behind
from open_lm.checkpoint.sharded import STATS, load_into, read_tensor_index
from open_lm.checkpoint.snapshot import Saved, in_file_order, live
from open_lm.checkpoint.state_dicts import (
    by_name,
    load_optimizers,
    load_weights,
    require_same_architecture,
    require_same_experts,
    spread_tensors,
)
from open_lm.checkpoint.tree import EXTRA_STATE, SEPARATOR, flat, nested
from open_lm.checkpoint.verify import verified_together
from open_lm.errors import CheckpointError
from open_lm.model.lora import holds_nf4, is_addition
from open_lm.train.random_state import restore_random_state
from open_lm.train.row_order import RowOrder, copy_from_file_order, order_of, row_orders
from open_lm.weights.file import load_file, named_weights, our_weights, plain_name

Use = Literal["evaluate", "weights", "state", "resume"]
"""The use of a checkpoint: its weights to evaluate; its weights to start from; optimizer, step and the rest too; all
that and the position in the data."""


@dataclass
class Stored:
    """The content of a checkpoint of consolidated files; rank 0 alone holds the tensors."""

    weights: dict[str, Any] = field(default_factory=dict)
    names: Mapping[str, Any] = field(default_factory=dict)
    """The weights as the file names them, which may not be as we do."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    extra_state: dict[str, dict[str, Any]] = field(default_factory=dict)


def restore(checkpoints: Checkpoints, state: Saved, loader: DataOrder | None) -> None:
    """Continue from the checkpoint of --resume, or start from --pretrained or --average; evaluate without `loader`.

    Raises:
        CheckpointError: it is missing or damaged, or of another model, optimizer, batch or data; on all ranks alike.
    """
    copy = checkpoints.copy
    if copy and loader is not None:
        checkpoints.taken_labels = state.world.on_rank0(lambda: labels_in(copy))
    if checkpoints.flags.resume or checkpoints.flags.start:
        _restore(checkpoints, state, loader)
    checkpoints.retention.begin()


def _restore(checkpoints: Checkpoints, state: Saved, loader: DataOrder | None) -> None:
    flags, stored = checkpoints.flags, Stored()
    faults.at("load", flags.resume)
    latest = newest_sound(state.world, checkpoints.places) if flags.resume == "latest" else None
    named = None if latest is not None else _named(flags)
    known = verified_together(state.world, named) if named else {}
    facts = state.world.on_rank0(lambda: _read(stored, checkpoints, state, latest, known, trains=loader is not None))
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
        for part in state.extra_state.values():
            part.reset()
        logging.info("starting from the weights of %s", facts["path"])
        return
    state.step, state.tokens = facts["step"], facts["tokens"]
    if use != "evaluate":
        state.precision.load_state_dict(facts["scaler"])
    if use == "resume" and loader is not None:
        if facts["data_state"] is not None:
            loader.check_state(facts["data_state"] | {"steps": state.step})
        state.world.on_rank0(lambda: _continue_here(checkpoints, facts))
        _restore_random(facts, checkpoints, state)
    logging.info("resumed from %s at step %d", facts["path"], state.step)


def _named(flags: CheckpointConfig) -> str | None:
    """The checkpoint that is asked for by its name; of several the first."""
    return flags.resume if flags.resume not in (None, "latest") else next(iter(flags.start), None)


def _load_consolidated(stored: Stored, facts: Mapping[str, Any], state: Saved, *, whole_state: bool) -> None:
    broadcast, orders = state.world.size > 1, row_orders(state.model)
    for part in (stored.weights, stored.optimizer, stored.extra_state) if orders else ():
        _put_in_memory_order(part, orders)
    load_weights(state.model, stored.weights, facts["path"], broadcast=broadcast)
    if whole_state:
        load_optimizers(state.model, state.optimizers, stored.optimizer, broadcast=broadcast)
        for name, part in _saved_extra_state(state, facts):
            part.load_state_dict(spread_tensors(stored.extra_state.get(name), part.state_dict()))


def _load_sharded(facts: Mapping[str, Any], state: Saved, *, whole_state: bool) -> None:
    """Every rank reads its own part, in place."""
    if holds_nf4(state.model):
        raise CheckpointError(f"{facts['path']} is sharded, which --lora-base nf4 cannot read: openlm consolidate it.")
    held_tree = live(state)
    tree = in_file_order(held_tree, state.model)
    parts: dict[str, Any] = {"weights": tree["weights"]}
    if whole_state:
        parts |= {"optimizer": {"state": tree["optimizer"]["state"]}, EXTRA_STATE: {}}
        for name, _ in _saved_extra_state(state, facts):
            parts[EXTRA_STATE][name] = tree[EXTRA_STATE][name]
    tensors, _ = flat(parts)
    found: Found = facts["found"]
    url = found.path if storage.is_remote(found.path) and found.checked != "nothing" else None
    with local_shards(found, only_facts=url is not None) as folder:
        held = {
            name for name in read_tensor_index(folder).state_dict_metadata if name.startswith(f"weights{SEPARATOR}")
        }
        if not whole_state:  # a base model has no adapters; they stay as they are here
            tensors = {name: t for name, t in tensors.items() if name in held or not is_addition(_bare(name))}
        if held != {name for name in tensors if name.startswith(f"weights{SEPARATOR}")}:
            raise CheckpointError(f"{facts['path']} is of another model. Give the --model it was trained with.")
        load_into(folder, tensors, alone=state.world.size == 1, url=url)
    _copy_ordered(tensors, flat(held_tree)[0], row_orders(state.model))
    tree = held_tree
    if not whole_state:
        return
    values = nested(facts["values"])
    if plain := values.get("optimizer", {}).get("state"):
        for name, moments in plain.items():
            tree["optimizer"]["state"][name] |= moments
        set_optimizer_state_dict(state.model, state.optimizers, tree["optimizer"])
    for name, part in state.extra_state.items():
        if name in parts[EXTRA_STATE]:
            part.load_state_dict(tree[EXTRA_STATE][name] | values.get(EXTRA_STATE, {}).get(name, {}))


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


def _saved_extra_state(state: Saved, facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The parts of the extra state that the checkpoint holds something of; the others start fresh."""
    for name, part in state.extra_state.items():
        if name not in facts["extra_state"]:
            logging.warning("%s holds no %s: it starts fresh.", facts["path"], name)
            part.reset()
    return [(name, part) for name, part in state.extra_state.items() if name in facts["extra_state"]]


def _choose(
    flags: CheckpointConfig, latest: Found | None, known: Verdicts, *, trains: bool
) -> tuple[Use, tuple[Found, ...]] | None:
    """The verified checkpoints to start from and their use; None when --resume latest finds none.

    Raises:
        CheckpointError: one is missing or damaged.
    """
    resumed: Use = "resume" if trains else "evaluate"
    if latest is not None:
        return resumed, (latest,)
    if flags.resume and flags.resume != "latest":
        return resumed, (resolve(flags.resume, "all", known),)
    if not flags.start:
        return None
    started: Use = "state" if flags.load_pretrained_state else "weights"
    files = tuple(resolve(name, "all" if started == "state" else "weights", known) for name in flags.start)
    return started if trains else "evaluate", files


def _read(
    stored: Stored, checkpoints: Checkpoints, state: Saved, latest: Found | None, known: Verdicts, *, trains: bool
) -> dict[str, Any] | None:
    """Fill `stored` from its files; what the other ranks need to know of it, or None when there is no checkpoint."""
    faults.at("read", checkpoints.folder)
    choice = _choose(checkpoints.flags, latest, known, trains=trains)
    if choice is None:
        return None
    use, files = choice
    found = files[0]
    path = found.path if len(files) == 1 else f"the mean of {', '.join(file.path for file in files)}"
    in_shards = len(files) == 1 and found.kind == "shards"
    if in_shards:
        file = _stats_of_shards(found)
    else:
        file = read_checkpoint(found) if len(files) == 1 else read_mean(files, checkpoints.flags.shares)
        stored.names = named_weights(file)
        stored.weights = our_weights(stored.names, merge=use == "weights" or not _has_additions(state))
        require_same_experts(stored.names, checkpoints.config["model"], path)
    stored_config = file.get("config") or {}
    asked = found.name if len(files) == 1 and found.name != "latest" else path
    require_same_architecture(stored_config.get("model", {}), checkpoints.config["model"], asked)
    facts = {
        "use": use,
        "path": path,
        "found": found,
        "sharded": in_shards,
        "step": int(file.get("step", 0)),
        "tokens": int(file.get("tokens", 0)),
    }
    if use in ("evaluate", "weights"):
        return facts
    for name in ("optimizer", "lora_rank", "lora_base", "dora", "task"):
        _require_same(name, stored_config.get("flags", {}), checkpoints.config["flags"], path)
    facts |= _state_of_shards(file) if in_shards else _state_of_files(stored, path, state)
    return _count_in_steps_of(state.tokens_per_step, facts)


def _has_additions(state: Saved) -> bool:
    return any(is_addition(plain_name(name)) for name, _ in state.model.named_parameters())


def _stats_of_shards(found: Found) -> dict[str, Any]:
    with local_shards(found, only_facts=True) as folder:
        return load_file(str(folder / STATS))


def _state_of_shards(stats: Mapping[str, Any]) -> dict[str, Any]:
    values = stats["values"]
    extra = {path.split(SEPARATOR)[1] for path in values if path.startswith(f"{EXTRA_STATE}{SEPARATOR}")}
    kept = {name: stats[name] for name in ("scaler", "data_state", "values")}
    return kept | {"extra_state": sorted(extra), "random": stats.get("random")}


def _state_of_files(stored: Stored, path: str, state: Saved) -> dict[str, Any]:
    optimizer, stats = (_file_beside(path, kind) for kind in ("optimizer", "stats"))
    stored.optimizer = by_name(optimizer["optimizer"], state.model, stored.names)
    present = [name for name in state.extra_state if storage.exists(_path_beside(path, name))]
    stored.extra_state = {name: _file_beside(path, name) for name in present}
    return {
        "step": int(stats["step"]),
        "scaler": optimizer.get("scaler", {}),
        "data_state": stats.get("data_state"),
        "random": stats.get("random"),
        "extra_state": present,
    }


def _require_same(name: str, stored: dict[str, Any], here: dict[str, Any], path: str) -> None:
    """Refuse to continue with another optimizer, adapter or task: what one has accumulated means nothing to another."""
    before, now = stored.get(name, here.get(name)), here.get(name)
    if before != now:
        raise CheckpointError(
            f"--resume {path}: --{name.replace('_', '-')} was {before}, is now {now}. Continue with {before}, "
            "or start a new run from the weights with --pretrained."
        )


def _count_in_steps_of(tokens_per_step: int, facts: dict[str, Any]) -> dict[str, Any]:
    """The facts with steps of this run's batch. Schedule, data and intervals follow from the tokens, so that another
    batch goes on where they make whole steps.

    Raises:
        CheckpointError: they do not.
    """
    before, tokens = facts["step"], facts["tokens"] or facts["step"] * tokens_per_step  # a file of OpenLM does not say
    step, rest = divmod(tokens, tokens_per_step)
    if rest:
        raise CheckpointError(
            f"--resume {facts['path']}: it was trained on {tokens} tokens, {tokens // before} a step, which are no "
            f"whole number of steps of the {tokens_per_step} tokens of --global-batch-size now. Give the batch it "
            "began with or one that divides, or start a new run with --pretrained."
        )
    if step != before:
        logging.warning(
            "a step had %d tokens and now has %d: step %d is counted as step %d, and lengths given in steps, such as "
            "--warmup, mean other numbers of tokens.", tokens // before, tokens_per_step, before, step,
        )  # fmt: skip
    return facts | {"tokens": tokens, "step": step, "stored_step": before}


def _file_beside(path: str, kind: str) -> dict[str, Any]:
    """The optimizer, stats or other file that belongs to weights file `path`, by name in the same folder."""
    beside = _path_beside(path, kind)
    if not storage.exists(beside):
        raise CheckpointError(
            f"--resume {path}: {beside} is missing. Use --pretrained to start from the weights alone."
        )
    return load_file(beside)


def _path_beside(path: str, kind: str) -> str:
    folder, name = storage.parent(path), path.rpartition("/")[2]
    return storage.join(folder, name.replace("epoch_", f"{kind}_", 1))


def _restore_random(facts: Mapping[str, Any], checkpoints: Checkpoints, state: Saved) -> None:
    world = state.world
    restore_random_state(
        facts["random"],
        device=world.device,
        rank=world.rank,
        size=world.size,
        seed=int(checkpoints.config["flags"].get("seed", 0)),
        step=state.step,
    )


def _continue_here(checkpoints: Checkpoints, facts: Mapping[str, Any]) -> None:
    """Let checkpoints after the one that is continued no longer count, here and in the remote copy. A run that leaves
    some behind begins a new branch, and so does one that counts in other steps. On rank 0."""
    found: Found = facts["found"]
    folders = [checkpoints.folder, *([checkpoints.copy] if checkpoints.copy else [])]
    is_own = any(storage.is_same(found.folder, folder) for folder in folders)
    branch = found.commit.branch if found.commit and is_own else 0
    checkpoints.branch = leave_behind(folders, branch, facts["stored_step"])
    if checkpoints.branch == branch and facts["step"] != facts["stored_step"]:
        checkpoints.branch += 1
