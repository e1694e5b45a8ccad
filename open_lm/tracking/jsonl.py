"""Metrics as lines of JSON in the run folder: always there, readable by anything."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping

from open_lm import storage
from open_lm.tracking.sink import RunFacts


class JsonlSink:
    """`metrics.jsonl`: one object a line, with the step and the metrics of that step. A resumed run appends."""

    def __init__(self, run: RunFacts):
        self._path = os.path.join(run.folder, "metrics.jsonl")
        self._file = open(self._path, "a", buffering=1)  # noqa: SIM115

    def rewind(self, step: int) -> None:
        """Drop the lines of steps after `step`: the run was interrupted after its last checkpoint and repeats them."""
        with open(self._path) as file:
            kept = [line for line in file if _step_of(line) <= step]
        storage.write_text(self._path, "".join(kept))
        self._file.close()
        self._file = open(self._path, "a", buffering=1)  # noqa: SIM115

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    """The step of one line; infinity for one that was cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
