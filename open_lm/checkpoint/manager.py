"""Checkpoint manager: writes a run's checkpoints and prunes old ones; called by every rank at the same steps."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from open_lm import faults, storage, text
from open_lm.checkpoint import commit as commits
from open_lm.checkpoint.background import Background
from open_lm.checkpoint.commit import SHARDS_SIGN
from open_lm.checkpoint.config import CONSOLIDATED_UP_TO, CheckpointConfig
from open_lm.checkpoint.remote_shards import sweep, write_remote_shards
from open_lm.checkpoint.retention import Retention, free_label
from open_lm.checkpoint.save_policy import SaveKind, kind_of
from open_lm.checkpoint.snapshot import Saved, Snapshot, in_file_order, live, take
from open_lm.checkpoint.space import lack_of_space
from open_lm.checkpoint.together import WRITE_ERRORS, outcome_of, problem_of, require_none
from open_lm.checkpoint.tree import Staging, tensors_of
from open_lm.checkpoint.writing import Target, write_consolidated, write_sharded
from open_lm.distributed import World, patient_group
from open_lm.errors import StorageError, everywhere
from open_lm.train.random_state import random_state

MAX_FAILED_SAVES = 3
"""Saves in a row that may fail (a full disk, say) before the run ends; training goes on meanwhile."""


LAST_SECONDS = 10.0
"""Time that a save by all ranks may still take when one of them is gone."""


class DataOrder(Protocol):
    """The part of a loader that is saved: the order of the data is a function of the step, so only its settings are."""

    def state(self, step: int) -> dict[str, Any]: ...

    def check_state(self, state: dict[str, Any]) -> None: ...


class Checkpoints:
    """The checkpoints of one run folder. `config` is kept inside each, so that none needs --model again."""

    def __init__(self, folder: str, flags: CheckpointConfig, *, name: str, config: Mapping[str, Any]):
        self.folder = folder
        self.config = dict(config)
        self.flags = flags
        self.problem: str | None = None
        """The fault of the last save, once it is known; None for a save that succeeded."""
        self.seconds = 0.0
        """Longest time of a save so far, from its start to its commit."""
        self.retention = Retention(folder, flags.n_kept, lambda: self.require_owner())
        self.branch = 0
        """Raised when the run goes back to an earlier checkpoint and leaves later ones behind."""
        self.copy: str | None = None
        """The remote folder that they are copied to."""
        self.taken_labels: frozenset[str] = frozenset()
        """Labels of remote copies, which are not written over either."""
        self.copy_logs: Callable[[], None] = _nothing
        """Copies the logs to where `copy` is; done before a checkpoint is there."""
        self.require_owner: Callable[[], None] = _nothing
        """Raises where another run has taken over the folder."""
        self._name = name
        self._label = ""
        self._failed_saves = 0
        self._background = Background()
        self._staging = Staging() if flags.async_save else None
        self._group: dist.ProcessGroup | None = None
        self._world = World()

    def save(
        self,
        state: Saved,
        loader: DataOrder,
        *,
        label: str,
        stats: Mapping[str, Any],
        kind: SaveKind = "interval",
        wait: bool = False,
    ) -> bool:
        """Write one checkpoint, then drop those that retention allows to go; False when it could not be written.

        With --async-save the files are written while training goes on (True: it has begun) unless `wait` is set; the
        one before is waited for, so that there is never more than one on its way. What is written is copied meanwhile
        too: nothing changes it before the end of the next step, and that waits for `state.copied`.

        Raises:
            StorageError: the third save in a row could not be written.
        """
        self.wait()
        self._world, self._label = state.world, label
        began = time.monotonic()
        found, problem = state.world.on_rank0(lambda: self._begin(label, state.step, kind))
        if problem:
            return self._note(problem)
        if not found:  # it is there already
            return True
        self._label = label = found
        beside = self._staging is not None and not wait
        work = self._work(state, loader, label=label, stats=stats, kind=kind, beside=beside)

        def timed() -> None:
            written = work()
            self.seconds = max(self.seconds, time.monotonic() - began)
            if written:
                self._thin_out(written)

        state.copied.clear()
        self._background.begin(timed, beside=beside)
        return self.wait() if wait or self._staging is None else True

    def _work(
        self, state: Saved, loader: DataOrder, *, label: str, stats: Mapping[str, Any], kind: SaveKind, beside: bool
    ) -> Callable[[], commits.Commit | None]:
        """The rest of a save, once the ranks have exchanged what a thread (if it is done `beside`) must not."""
        tree = in_file_order(live(state), state.model)
        in_shards = self._in_shards(tree)
        if in_shards and self._group is None and state.world.size > 1:
            self._group = patient_group()
        shards = state.world.on_rank0(lambda: f"epoch_{label}{SHARDS_SIGN}{secrets.token_hex(4)}")
        random = state.world.gather(random_state(state.world.device))
        full = lack_of_space(state.world, self.folder, tree, own_disks=self.home != self.folder)
        copy = partial(take, tree, sharded=in_shards, is_master=state.world.is_master, staging=self._staging)
        copied: tuple[dict[str, Any] | None, str | None] | None = (None, full) if full else None
        if not full and not (beside and (in_shards or _is_whole(tree))):
            copied = outcome_of(copy)  # to gather a tensor takes all ranks, here and now
        about = Snapshot(
            label=label,
            kind=kind,
            step=state.step,
            tokens=state.tokens,
            tree={},
            scaler=state.precision.state_dict(),
            stats={**stats, "data_state": loader.state(state.step), "random": random},
        )

        def work() -> commits.Commit | None:
            tree: dict[str, Any] | None
            try:
                if self._world.device.type == "cuda":  # a new thread starts on GPU 0, whichever is this rank's
                    torch.cuda.set_device(self._world.device)
                tree, problem = copied or outcome_of(copy)
            finally:
                state.copied.set()
            problem = problem or problem_of(lambda: faults.at("save", label))
            require_none(problem, self._group if in_shards else None)
            return self._write(replace(about, tree=tree or {}), shards if in_shards else None)

        return work

    def _write(self, snapshot: Snapshot, shards: str | None) -> commits.Commit | None:
        """Write `snapshot`, into the new folder `shards` if given; the commit on rank 0."""
        if shards is None:
            return write_consolidated(self._target, snapshot) if self._world.is_master else None
        common = self._target, snapshot, shards, self._world, self._group
        if self.home != self.folder:
            return write_remote_shards(*common, local=self.folder)
        return write_sharded(*common)

    def wait(self) -> bool:
        """Wait for the save on its way, if there is one: whether it succeeded. Every rank must call this.

        Raises:
            StorageError: it was the third in a row that failed.
        """
        if not self._background.is_open:
            return self.problem is None
        error = self._background.finish()
        if error is not None and not isinstance(error, WRITE_ERRORS):
            raise error
        return self._note(None if error is None else str(error) or type(error).__name__)

    def _note(self, mine: str | None) -> bool:
        """Take notice of how a save ended on this rank and the others, None: well; whether it succeeded."""
        self.problem = next((problem for problem in self._world.gather(mine) if problem), None)
        self._failed_saves = self._failed_saves + 1 if self.problem else 0
        if self._failed_saves >= MAX_FAILED_SAVES:
            raise everywhere(
                StorageError(
                    f"checkpoint {self._label} could not be written to {storage.shown(self.home)}, nor those before: "
                    f"{self.problem} Make room, then use --resume latest."
                )
            )
        if self.problem:
            message = "checkpoint %s was not written: %s Training goes on; the next is tried again."
            logging.error(message, self._label, self.problem)
        return self.problem is None

    def wait_if_done(self) -> None:
        """At a step's end: take notice of a save that has ended, where no other rank has to be asked."""
        if self._world.size == 1 and self._background.has_result:
            self.wait()

    def close(self, *, is_lost: bool = False) -> bool:
        """Wait for the save on its way, however the run ended, without asking other ranks: whether it has ended.

        Where another rank `is_lost`, one that all ranks write together may never end, and the others wait for this
        one: it gets LAST_SECONDS.
        """
        has_ended = self._background.wait(LAST_SECONDS if is_lost and self._group is not None else None)
        if has_ended and (error := self._background.finish()):
            self.problem = str(error) or type(error).__name__
            logging.error("checkpoint %s was not written: %s", self._label, self.problem)
        return has_ended

    @property
    def home(self) -> str:
        """The place that checkpoints are written to and resumed from: the folder, or its remote copy."""
        return self.copy if self.copy and self.flags.checkpoint_format == "sharded-remote" else self.folder

    @property
    def places(self) -> list[str]:
        """The places that --resume latest looks in: home first."""
        return [self.home, *(place for place in (self.folder, self.copy) if place and place != self.home)]

    @property
    def _target(self) -> Target:
        owned = self.retention, self.branch, self.require_owner
        logs = self.copy_logs if self.home != self.folder else _nothing
        return Target(self.home, self._name, self.config, *owned, logs)

    def _in_shards(self, tree: Mapping[str, Any]) -> bool:
        if self.flags.checkpoint_format != "auto":
            return self.flags.checkpoint_format.startswith("sharded")
        return sum(tensor.numel() for tensor in tree["weights"].values()) > CONSOLIDATED_UP_TO

    def _begin(self, label: str, step: int, kind: SaveKind) -> tuple[str | None, str | None]:
        """`_free_label`, or the problem that this save fails with before it has begun.

        Raises:
            FolderLocked: another run has taken over the folder.
        """
        self.require_owner()
        return outcome_of(lambda: self._free_label(label, step, kind))

    def _free_label(self, label: str, step: int, kind: SaveKind) -> str:
        """`label`, or another if files of that label are here: none is ever written over. "": it is there already."""
        self.retention.sweep()
        if self.home != self.folder:
            sweep(self.home)
        for here in commits.committed(self.home):
            if (here.step, here.branch) == (step, self.branch) and (here.label == label or kind_of(here) == kind):
                return ""
        return free_label(self.home, label, step, self.taken_labels)

    def _thin_out(self, written: commits.Commit) -> None:
        logging.info("saved checkpoint %s at step %d (%s)", written.label, written.step, text.size(written.size_bytes))
        self.retention.begin()
        if problem := problem_of(self.retention.thin_out):
            logging.warning("older checkpoints were not deleted: %s It is tried again after the next save.", problem)


def _is_whole(tree: Mapping[str, Any]) -> bool:
    return not any(isinstance(tensor, DTensor) for tensor in tensors_of(tree))


def _nothing() -> None:
    pass
