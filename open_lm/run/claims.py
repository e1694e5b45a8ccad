"""Claims of ranks, to stop or to save, that ride on the sum of a step's counts: no exchange of their own."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from open_lm.distributed import World


class Claims(NamedTuple):
    """Requests of a rank before a step; or, summed, those of at least one rank."""

    stop: bool = False
    """A stop signal came, or the time limit is near."""
    save: bool = False
    """--save-every-minutes have passed."""


class Agreement:
    """The claims of all ranks, read by each after the same step.

    With one process that is what it claims now; with several, what they claimed when the step began. On GPUs it is read
    one step later, so that the host never waits for the step that it has just queued.
    """

    def __init__(self, world: World):
        self.lag = 0 if world.size == 1 else 1 if world.device.type == "cpu" else 2
        """Steps until all ranks know of a claim."""
        self._agreed = Claims()
        self._on_the_way: list[_Arriving] = []
        self._began = 0.0
        self.delay_seconds = 0.0
        """Time until all ranks know of a claim, by the last step."""

    def step_begins(self) -> None:
        """Start the clock of a step."""
        self._began = time.monotonic()

    def read(self, counts: Tensor | None) -> None:
        """Take the `counts` of ranks that made each claim, which came with the step that was just taken."""
        self.delay_seconds = self.lag * (time.monotonic() - self._began)
        if counts is None:
            return
        self._on_the_way.append(_Arriving(counts))
        if len(self._on_the_way) == self.lag:
            self._agreed = self._on_the_way.pop(0).claims()

    def on(self, own: Claims) -> Claims:
        """The agreed claims after this step; `own` are those of this process at present."""
        return self._agreed if self.lag else own

    def forget_save(self) -> None:
        """A checkpoint was just written: claims made before ask for no other."""
        self._agreed = self._agreed._replace(save=False)
        for arriving in self._on_the_way:
            arriving.saved = True


class _Arriving:
    """Counts on their way to the host."""

    saved = False

    def __init__(self, counts: Tensor):
        on_gpu = counts.device.type == "cuda"
        self._counts = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True) if on_gpu else counts
        self._event = torch.cuda.Event() if on_gpu else None
        if self._event is not None:
            self._counts.copy_(counts, non_blocking=True)
            self._event.record()

    def claims(self) -> Claims:
        """The counts as answers; waits until they are there."""
        if self._event is not None:
            self._event.synchronize()
        stop, save = self._counts.tolist()
        return Claims(bool(stop), bool(save) and not self.saved)
