"""Running totals of step metrics since the last report."""

from __future__ import annotations

import resource
import sys
import time

import torch
from torch import Tensor

from open_lm.distributed import World


def peak_memory_gib(device: torch.device) -> float:
    """The most memory held so far, in GiB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    in_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * in_bytes / 2**30


class Meter:
    """Adds up reports on the device; only `read` waits for their values.

    Each step counts once: the loss read is the mean over the steps since the last `read`.
    """

    def __init__(self, world: World, tokens_per_step: int, flops_per_token: int, peak_flops: float | None):
        self._world = world
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._tokens_per_step = tokens_per_step
        self.reset()

    def reset(self) -> None:
        """Start a new stretch of steps now."""
        self._sums: Tensor | None = None
        self.n_steps = 0
        self._began = time.perf_counter()

    def add(self, shares: Tensor, common: Tensor) -> None:
        """Add one step: `shares` are this rank's parts of sums over ranks, `common` is the same on every rank."""
        sums = torch.cat((shares, common / self._world.shape.n_shares))
        self._sums = sums if self._sums is None else self._sums + sums
        self.n_steps += 1

    def skip(self, seconds: float) -> None:
        """Leave out `seconds` that were not spent on steps (a validation, a save)."""
        self._began += seconds

    def read(self) -> tuple[list[float], float]:
        """Means per step over all ranks, and the seconds per step, since the last `read`; all ranks must call it."""
        assert self._sums is not None
        means = (self._world.sum(self._sums) / self.n_steps).tolist()
        seconds = (time.perf_counter() - self._began) / self.n_steps
        self.reset()
        return means, seconds

    def rates(self, seconds_per_step: float) -> dict[str, float]:
        """Tokens per second, also under OpenLM's name that says samples; and the model FLOPs utilisation (PaLM,
        arXiv:2204.02311), where the device's peak is known."""
        per_second = self._tokens_per_step / seconds_per_step
        used = per_second * self._flops_per_token / self._world.size
        return {
            **({"train/mfu": used / self._peak_flops} if self._peak_flops else {}),
            "train/tokens_per_second": per_second,
            "train/samples_per_second": per_second,
            "train/samples_per_second_per_gpu": per_second / self._world.size,
        }
