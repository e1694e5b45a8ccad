"""How a run's checkpoints are written, thinned out and restored; every rank calls the same methods."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from open_lm import storage, text
from open_lm.checkpoint import commit as commits
from open_lm.checkpoint.commit import Commit
from open_lm.checkpoint.config import CheckpointConfig
from open_lm.checkpoint.contents import by_name, gather, load_optimizers, load_weights, require_same_architecture
from open_lm.checkpoint.find import latest
from open_lm.checkpoint.weights import clean_state_dict, load_file
from open_lm.distributed import World
from open_lm.errors import CheckpointError, StorageError
from open_lm.precision import Precision

MAX_FAILED_SAVES = 3
"""Saves in a row that may fail (a full disk, say) before the run ends; training goes on meanwhile."""


class Saved(Protocol):
    """What of a training state the checkpoints read and set."""

    model: nn.Module
    optimizers: list[Optimizer]
    precision: Precision
    world: World
    step: int
    tokens: int


class DataOrder(Protocol):
    """What of a loader the checkpoints read: the data are a function of the step, so only the settings are kept."""

    def state(self, step: int) -> dict[str, Any]: ...

    def check_state(self, state: dict[str, Any]) -> None: ...


class Checkpoints:
    """The checkpoints of one run folder. `config` is kept inside each, so that none needs --model again."""

    def __init__(self, folder: str, flags: CheckpointConfig, *, name: str, config: Mapping[str, Any]):
        self.folder = folder
        self._flags = flags
        self._name = name
        self._config = dict(config)
        self._failed_saves = 0

    def save(self, state: Saved, loader: DataOrder, *, label: str, is_final: bool, stats: Mapping[str, Any]) -> bool:
        """Write one checkpoint, then drop those that retention allows to go; False when it could not be written.

        Raises:
            StorageError: the last checkpoint of the run, or the third in a row, could not be written.
        """
        weights, optimizer = gather(state.model, state.optimizers)
        problem: str | None = None
        if state.world.is_master:
            try:
                self._write(state, loader.state(state.step), weights, optimizer, label, dict(stats), is_final)
                self._thin_out()
            except (StorageError, OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
                problem = str(error)
        problem = state.world.broadcast(problem)
        self._failed_saves = self._failed_saves + 1 if problem else 0
        if problem and (is_final or self._failed_saves >= MAX_FAILED_SAVES):
            raise StorageError(
                f"checkpoint {label} could not be written to {self.folder}: {problem} "
                "Make room and use --resume latest."
            )
        if problem:
            logging.error(
                "checkpoint %s was not written: %s Training goes on; the next one is tried again.", label, problem
            )
        return problem is None

    def _write(
        self, state: Saved, data: dict, weights: dict, optimizer: dict, label: str, stats: dict, is_final: bool
    ) -> None:
        head = {"epoch": _number(label), "name": self._name}
        about = {"step": state.step, "tokens": state.tokens, "evaluation_metrics": stats.get("evaluation_metrics", [])}
        scaler = state.precision.state_dict()
        payloads = {
            f"epoch_{label}.pt": {**head, **about, "state_dict": weights, "config": self._config},
            f"optimizer_{label}.pt": {**head, "optimizer": optimizer, **({"scaler": scaler} if scaler else {})},
            f"stats_{label}.pt": {**head, **about, **stats, "is_final_checkpoint": is_final, "data_state": data},
        }
        self._require_space(weights, optimizer)
        storage.remove(
            storage.join(self.folder, f"epoch_{label}.commit.json")
        )  # rewriting: it does not exist meanwhile
        try:
            files = {name: commits.save_file(self.folder, name, payload) for name, payload in payloads.items()}
        except BaseException:
            self._drop_uncommitted(payloads)
            raise
        commits.publish(self.folder, Commit(label, state.step, files, {"data_state": data, "config": self._config}))
        total = sum(record.size_bytes for record in files.values())
        logging.info("saved checkpoint %s at step %d (%s)", label, state.step, text.size(total))

    def _drop_uncommitted(self, names: Mapping[str, Any]) -> None:
        for name in names:
            storage.remove(storage.join(self.folder, name))

    def _require_space(self, weights: dict, optimizer: dict) -> None:
        tensors = [*weights.values(), *(t for s in optimizer["state"].values() for t in s.values())]
        needed = sum(t.numel() * t.element_size() for t in tensors if hasattr(t, "numel"))
        free = storage.free_bytes(self.folder)
        if free is not None and free < 1.02 * needed:
            raise StorageError(f"no space left: {text.size(needed)} are needed, {text.size(free)} free.")

    def _thin_out(self) -> None:
        """Delete what retention lets go: never the newest, and only after it has been written and found complete."""
        complete = commits.committed(self.folder)
        newest, older = complete[0], complete[1:]
        n_kept = self._flags.n_kept
        surplus = older[n_kept - 1 :] if n_kept is not None else []
        passing = [c for c in older if not self._is_kept(c)]
        for commit in {c.label: c for c in (*surplus, *passing)}.values():
            assert commit is not newest
            commits.discard(self.folder, commit)

    def _is_kept(self, commit: Commit) -> bool:
        """Whether --save-frequency asks for this checkpoint, rather than --save-most-recent or an interruption."""
        every = self._flags.save_frequency
        return commit.label.isdigit() and every > 0 and int(commit.label) % every == 0

    def wants(self, interval: int, *, is_last: bool) -> bool:
        """Whether a checkpoint is due at the end of `interval`."""
        every = self._flags.save_frequency
        return is_last or self._flags.save_most_recent or (every > 0 and interval % every == 0)

    def restore(self, state: Saved, loader: DataOrder | None) -> str | None:
        """Continue from the checkpoint that --resume names (or start from the weights of --pretrained).

        Returns the path it took, or None when `--resume latest` finds none and the run starts at step 0.
        """
        if self._flags.pretrained:
            facts = self._load_weights(state, self._flags.pretrained)
            if loader is None:  # evaluating: the results say how far the weights were trained
                state.step, state.tokens = facts
            return self._flags.pretrained
        if not self._flags.resume:
            return None
        path = self._flags.resume
        if path == "latest":
            path = state.world.broadcast(latest(self.folder) if state.world.is_master else None)
            if path is None:
                logging.info("no checkpoint in %s yet: starting at step 0", self.folder)
                return None
        state.step, state.tokens = self._load_weights(state, path)
        if loader is not None:
            self._load_rest(state, path, loader)
        logging.info("resumed from %s at step %d", path, state.step)
        return path

    def _load_weights(self, state: Saved, path: str) -> tuple[int, int]:
        """Put the weights of the file at `path` into the model; returns the steps and tokens it was trained for."""
        broadcast = state.world.size > 1
        reads = state.world.is_master or not broadcast
        if reads:
            self._require_undamaged(path)
        file = load_file(path) if reads else {}
        require_same_architecture(file.get("config", {}).get("model", {}), self._config["model"], path)
        load_weights(state.model, clean_state_dict(file) if reads else {}, path, broadcast=broadcast)
        return state.world.broadcast((int(file.get("step", 0)), int(file.get("tokens", 0))) if reads else None)

    def _load_rest(self, state: Saved, path: str, loader: DataOrder) -> None:
        """Put back all else that must survive a restart: the optimizer, the loss scale, the place in the data."""
        broadcast = state.world.size > 1
        reads = state.world.is_master or not broadcast
        folder, name = storage.parent(path), path.rpartition("/")[2]
        companions = self._companions(folder, name) if reads else {}
        optimizer = by_name(companions["optimizer"]["optimizer"], state.model) if reads else {}
        load_optimizers(state.model, state.optimizers, optimizer, broadcast=broadcast)
        rest = (companions["optimizer"].get("scaler", {}), companions["stats"]) if reads else None
        scaler, stats = state.world.broadcast(rest)
        state.precision.load_state_dict(scaler)
        if "data_state" in stats:
            loader.check_state(stats["data_state"])

    def _require_undamaged(self, path: str) -> None:
        commit = commits.commit_beside(path)
        if commit and not commits.hashes_match(storage.parent(path), commit):
            raise CheckpointError(
                f"{path}: its files are not those that were written. Use --resume latest, or another checkpoint."
            )

    def _companions(self, folder: str, name: str) -> dict[str, Any]:
        """The optimizer and stats files that belong to weights file `name`, by name in the same folder."""
        files = {}
        for kind in ("optimizer", "stats"):
            path = storage.join(folder, name.replace("epoch_", f"{kind}_", 1))
            if not storage.exists(path):
                raise CheckpointError(
                    f"--resume {name}: {path} is missing. Use --pretrained to start anew from the weights alone."
                )
            files[kind] = load_file(path)
        return files


def _number(label: str) -> int:
    """The K of a label: `3`, or `3-step120` for a checkpoint inside the fourth interval."""
    return int(label.partition("-")[0])
