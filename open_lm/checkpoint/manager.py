"""How a run's checkpoints are written and thinned out; every rank calls the same methods."""

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
from open_lm.checkpoint.contents import gather
from open_lm.distributed import World
from open_lm.errors import StorageError
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

    @property
    def tokens_per_step(self) -> int: ...


class DataOrder(Protocol):
    """What of a loader the checkpoints read: the data are a function of the step, so only the settings are kept."""

    def state(self, step: int) -> dict[str, Any]: ...

    def check_state(self, state: dict[str, Any]) -> None: ...


class Checkpoints:
    """The checkpoints of one run folder. `config` is kept inside each, so that none needs --model again."""

    def __init__(self, folder: str, flags: CheckpointConfig, *, name: str, config: Mapping[str, Any]):
        self.folder = folder
        self.config = dict(config)
        self.flags = flags
        self._name = name
        self._failed_saves = 0

    def due(self, interval: int, *, is_last: bool) -> bool:
        """Whether to write a checkpoint at the end of `interval`."""
        return self.keeps(interval, is_last=is_last) or self.flags.save_most_recent

    def keeps(self, interval: int, *, is_last: bool) -> bool:
        """Whether the checkpoint at the end of `interval` stays, as far as --save-frequency is concerned."""
        every = self.flags.save_frequency
        return is_last or (every > 0 and interval % every == 0)

    def save(
        self,
        state: Saved,
        loader: DataOrder,
        *,
        label: str,
        stats: Mapping[str, Any],
        kept: bool = True,
        is_final: bool = False,
    ) -> bool:
        """Write one checkpoint, then drop those that retention allows to go; False when it could not be written.

        One that is not `kept` goes as soon as the next is there.

        Raises:
            StorageError: the last checkpoint of the run, or the third in a row, could not be written.
        """
        weights, optimizer = gather(state.model, state.optimizers)
        problem: str | None = None
        if state.world.is_master:
            try:
                all_stats = {**stats, "is_final_checkpoint": is_final, "data_state": loader.state(state.step)}
                self._write(state, weights, optimizer, label, all_stats, kept)
            except (StorageError, OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
                problem = str(error)
        problem = state.world.broadcast(problem)
        self._failed_saves = self._failed_saves + 1 if problem else 0
        if problem and (is_final or self._failed_saves >= MAX_FAILED_SAVES):
            raise StorageError(
                f"checkpoint {label} could not be written to {self.folder}: {problem} Then use --resume latest."
            )
        if problem:
            logging.error(
                "checkpoint %s was not written: %s Training goes on; the next is tried again.", label, problem
            )
        return problem is None

    def _write(self, state: Saved, weights: dict, optimizer: dict, label: str, stats: dict, kept: bool) -> None:
        present = {commit.label: commit for commit in commits.committed(self.folder)}
        if label in present:  # a checkpoint that exists is never written over
            if present[label].step == state.step:
                return
            label = f"{_number(label)}-step{state.step}"
        head = {"epoch": _number(label), "name": self._name, "step": state.step, "tokens": state.tokens}
        results = {"evaluation_metrics": stats["evaluation_metrics"]}
        scaler = state.precision.state_dict()
        payloads = {
            f"epoch_{label}.pt": {**head, **results, "state_dict": weights, "config": self.config},
            f"optimizer_{label}.pt": {**head, "optimizer": optimizer, **({"scaler": scaler} if scaler else {})},
            f"stats_{label}.pt": {**head, **stats},
        }
        self._require_space(weights, optimizer)
        try:
            files = {name: commits.save_file(self.folder, name, payload) for name, payload in payloads.items()}
        except BaseException:
            for name in payloads:
                storage.remove(storage.join(self.folder, name))
            raise
        written = Commit(label, state.step, files, {"kept": kept, "config": self.config})
        commits.publish(self.folder, written)
        logging.info("saved checkpoint %s at step %d (%s)", label, state.step, text.size(written.size_bytes))
        self._thin_out(written)

    def _require_space(self, weights: dict, optimizer: dict) -> None:
        tensors = [*weights.values(), *(t for s in optimizer["state"].values() for t in s.values())]
        needed = sum(t.numel() * t.element_size() for t in tensors if hasattr(t, "numel"))
        free = storage.free_bytes(self.folder)
        if free is not None and free < 1.02 * needed:
            raise StorageError(f"no space left: {text.size(needed)} are needed, {text.size(free)} free.")

    def _thin_out(self, written: Commit) -> None:
        """Delete what retention lets go: never the one just written, and only because that one is complete."""
        complete = commits.committed(self.folder)
        others = [commit for commit in complete if commit.label != written.label]
        if len(others) == len(complete):
            return
        n_kept = self.flags.n_kept
        surplus = others[n_kept - 1 :] if n_kept is not None else []
        passing = [commit for commit in others if not commit.facts.get("kept", True)]
        for commit in {c.label: c for c in (*surplus, *passing)}.values():
            commits.discard(self.folder, commit)


def _number(label: str) -> int:
    """The K of a label: `3`, or `3-step120` for a checkpoint inside the fourth interval."""
    return int(label.partition("-")[0])
