"""How a run's checkpoints are written and thinned out; every rank calls the same methods."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from open_lm import storage, text
from open_lm.checkpoint import commit as commits
from open_lm.checkpoint.commit import Commit
from open_lm.checkpoint.config import CheckpointConfig
from open_lm.checkpoint.retention import may_go
from open_lm.checkpoint.snapshot import Saved, Snapshot, take
from open_lm.checkpoint.when import Kind
from open_lm.errors import StorageError

MAX_FAILED_SAVES = 3
"""Saves in a row that may fail (a full disk, say) before the run ends; training goes on meanwhile."""


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

    def save(
        self,
        state: Saved,
        loader: DataOrder,
        *,
        label: str,
        stats: Mapping[str, Any],
        kind: Kind = "interval",
        is_final: bool = False,
    ) -> bool:
        """Write one checkpoint, then drop those that retention allows to go; False when it could not be written.

        Raises:
            StorageError: the last checkpoint of the run, or the third in a row, could not be written.
        """
        about = {"is_final_checkpoint": is_final, "data_state": loader.state(state.step)}
        snapshot = take(state, label=label, kind=kind, stats={**stats, **about})
        problem: str | None = None
        if state.world.is_master:
            try:
                self._write(snapshot)
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

    def _write(self, snapshot: Snapshot) -> None:
        present = {commit.label: commit for commit in commits.committed(self.folder)}
        label = snapshot.label
        if label in present:  # a checkpoint that exists is never written over
            if present[label].step == snapshot.step:
                return
            snapshot = replace(snapshot, label=f"{snapshot.epoch}-step{snapshot.step}")
        payloads = snapshot.payloads(self._name, {"config": self.config})
        self._require_space(snapshot.size_bytes)
        try:
            files = {name: commits.save_file(self.folder, name, payload) for name, payload in payloads.items()}
        except BaseException:
            for name in payloads:
                storage.remove(storage.join(self.folder, name))
            raise
        written = Commit(snapshot.label, snapshot.step, files, {"kind": snapshot.kind, "config": self.config})
        commits.publish(self.folder, written)
        logging.info("saved checkpoint %s at step %d (%s)", written.label, written.step, text.size(written.size_bytes))
        for commit in may_go(commits.committed(self.folder), written, self.flags.n_kept):
            commits.discard(self.folder, commit)

    def _require_space(self, needed: int) -> None:
        free = storage.free_bytes(self.folder)
        if free is not None and free < 1.02 * needed:
            raise StorageError(f"no space left: {text.size(needed)} are needed, {text.size(free)} free.")
