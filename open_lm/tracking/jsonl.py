"""Metrics as lines of JSON in the run folder: always there, readable by anything."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping

from open_lm.tracking.sink import RunFacts


class JsonlSink:
    """`metrics.jsonl`: one object a line, with the step and the metrics of that step. A resumed run appends."""

    def __init__(self, run: RunFacts):
        self._file = open(os.path.join(run.folder, "metrics.jsonl"), "a", buffering=1)  # noqa: SIM115

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")

    def close(self) -> None:
        self._file.close()
