"""Spike guard: skips steps whose loss or gradient norm is an outlier."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

WINDOW = 128
"""Steps that a new one is compared with."""
LEAST = WINDOW // 2
"""Steps to have seen before any is left out: the first ones of a run fall steeply."""


class SpikeGuard:
    """Skips a step when its loss or gradient norm lies more than `sigma` standard deviations above the mean of the last
    128 (as in OLMo, arXiv:2501.00656).

    Skipped steps count in the mean: a lasting shift soon stops counting as a spike. A figure that is not finite is not
    a spike: it raises TrainingDiverged.
    """

    def __init__(self, sigma: float):
        self._sigma = sigma
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)

    def accept(self, loss: float, grad_norm: float) -> bool:
        """Whether to take the step with this global loss and gradient norm; the same on every rank."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return True
        stands_out = self._stands_out(self._losses, loss) or self._stands_out(self._norms, grad_norm)
        self._losses.append(loss)
        self._norms.append(grad_norm)
        return not stands_out

    def _stands_out(self, seen: deque[float], value: float) -> bool:
        if len(seen) < LEAST:
            return False
        mean = statistics.fmean(seen)
        return value - mean > self._sigma * statistics.stdev(seen, mean)

    def state_dict(self) -> dict[str, Any]:
        """The figures that a new step is compared with."""
        return {"losses": list(self._losses), "grad_norms": list(self._norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.reset()
        self._losses.extend(state["losses"])
        self._norms.extend(state["grad_norms"])

    def reset(self) -> None:
        """Forget all steps."""
        self._losses.clear()
        self._norms.clear()
