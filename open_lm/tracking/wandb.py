"""Metrics on Weights & Biases, one run there for one run here, however often it is restarted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from open_lm.errors import ConfigError
from open_lm.tracking.sink import RunFacts


class WandbSink:
    """One `log` call a step. The run's id is kept in `wandb_id.txt`; WANDB_MODE=offline works without a network."""

    def __init__(self, run: RunFacts):
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("--report-to wandb: the package is missing. pip install wandb") from error
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

    def rewind(self, step: int) -> None:
        """Nothing to do: Weights & Biases passes over steps that it has already."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()
