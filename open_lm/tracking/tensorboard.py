"""Metrics as TensorBoard event files in `<run>/tensorboard`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from open_lm.errors import ConfigError
from open_lm.tracking.sink import Resumed, RunFacts


class TensorboardSink:
    """Writes scalars; a resumed run goes on in the same folder."""

    def __init__(self, run: RunFacts):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("--report-to tensorboard: the package is missing. pip install tensorboard") from error
        self._folder, self._make = os.path.join(run.folder, "tensorboard"), SummaryWriter
        self._part = 1
        while os.path.isdir(os.path.join(self._folder, f"part_{self._part + 1}")):
            self._part += 1
        self._writer = self._make(self._path)

    @property
    def _path(self) -> str:
        """The folder of the part at work: a change of the batch begins another, since TensorBoard draws over steps."""
        return self._folder if self._part == 1 else os.path.join(self._folder, f"part_{self._part}")

    def rewind(self, to: Resumed) -> None:
        """TensorBoard hides what was measured later."""
        self._writer.close()
        self._writer = self._make(self._path, purge_step=to.step_before + 1)
        if to.counts_otherwise:
            self._writer.close()
            self._part += 1
            self._writer = self._make(self._path)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table in Markdown, among the texts."""
        lines = [columns, ["---"] * len(columns), *rows]
        table = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
        self._writer.add_text(name, table, step)

    def close(self) -> None:
        self._writer.close()


def _cell(value: Any) -> str:
    """A value as Markdown has it in a table, on one line."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", "⏎")
