"""Metrics as lines of JSON in the run folder: always there, readable by anything."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence

from open_lm import storage
from open_lm.report.rows import read_rows
from open_lm.tracking.sink import Resumed, RunFacts


class JsonlSink:
    """`metrics.jsonl`: one object a line, with the step and the metrics of that step. A resumed run appends."""

    def __init__(self, run: RunFacts):
        self._path = os.path.join(run.folder, "metrics.jsonl")
        if os.path.isfile(self._path):  # no pipe or device, which may have no end
            self._keep(whole_lines(self._path))
        self._file = open(self._path, "a", buffering=1)  # noqa: SIM115

    def rewind(self, to: Resumed) -> None:
        """Drop the lines of what was measured later: the run repeats it."""
        self._file.close()
        lines, rows = whole_lines(self._path), read_rows(self._path, to.batch_before)
        self._keep([line for line, row in zip(lines, rows, strict=True) if not to.forgets(row.tokens)])
        self._file = open(self._path, "a", buffering=1)  # noqa: SIM115

    def _keep(self, lines: Sequence[str]) -> None:
        """Write `lines`, where the file has others."""
        content = "".join(f"{line}\n" for line in lines)
        if content != storage.read_text(self._path):
            storage.write_text(self._path, content)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")

    def close(self) -> None:
        self._file.close()


def whole_lines(path: str) -> list[str]:
    """The lines of a metrics.jsonl that hold a step: one that a kill cut off does not."""
    return [line for line in storage.read_text(path).split("\n") if _has_step(line)]


def _has_step(line: str) -> bool:
    try:
        return isinstance(json.loads(line)["step"], int)
    except (ValueError, KeyError, TypeError):
        return False
