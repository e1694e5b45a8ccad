"""Metrics as TensorBoard event files in `<run>/tensorboard`."""

from __future__ import annotations

import os
from collections.abc import Mapping

from open_lm.errors import ConfigError
from open_lm.tracking.sink import RunFacts


class TensorboardSink:
    """Writes scalars; a resumed run goes on in the same folder."""

    def __init__(self, run: RunFacts):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("--report-to tensorboard: the package is missing. pip install tensorboard") from error
        self._writer = SummaryWriter(os.path.join(run.folder, "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
