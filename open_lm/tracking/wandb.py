"""Metrics on Weights & Biases, one run there for one run here, however often it is restarted."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from open_lm.errors import ConfigError
from open_lm.tracking.sink import Resumed, RunFacts


class WandbSink:
    """One call a step, with all that was logged of it: it is sent when the next step begins, as wandb itself would.

    The run's id is kept in `wandb_id.txt`; WANDB_MODE=offline works without a network.
    """

    def __init__(self, run: RunFacts):
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("--report-to wandb: the package is missing. pip install wandb") from error
        if not _is_logged_in(wandb):
            raise ConfigError(
                "--report-to wandb: not logged in. Run `wandb login`, set WANDB_API_KEY, or keep the run here "
                "with WANDB_MODE=offline."
            )
        id_file = Path(run.folder, "wandb_id.txt")
        self._run = wandb.init(
            project=run.tracking.wandb_project_name,
            name=run.name,
            notes=run.tracking.wandb_notes or None,
            id=id_file.read_text().strip() if id_file.exists() else None,
            resume="allow",
            config=dict(run.flags),
            dir=os.path.abspath(run.folder),
        )
        id_file.write_text(self._run.id)
        self._table = wandb.Table
        self._shift_file = Path(run.folder, "wandb_shift.txt")
        self._shift = int(self._shift_file.read_text()) if self._shift_file.exists() else 0
        self._step, self._pending = 0, dict[str, Any]()

    def rewind(self, to: Resumed) -> None:
        """Weights & Biases skips steps that it has already: where a larger batch counts them from lower numbers again,
        they go on there from where they were."""
        if to.counts_otherwise:
            self._shift += max(0, to.step_before - to.step)
            self._shift_file.write_text(str(self._shift))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        if step != self._step:
            self._send()
        self._step = step
        self._pending |= metrics

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table of this step beside its metrics."""
        self.log(step, {name: self._table(columns=list(columns), data=[list(row) for row in rows])})

    def _send(self) -> None:
        if self._pending:
            self._run.log(self._pending, step=self._step + self._shift)
        self._pending = {}

    def close(self) -> None:
        self._send()
        self._run.finish()


def _is_logged_in(wandb: Any) -> bool:
    """Whether a key is known, or none is needed."""
    if os.environ.get("WANDB_MODE", "online") != "online":
        return True
    return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
