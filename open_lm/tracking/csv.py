"""Metrics as a table in the run folder: one row a step, for spreadsheets and pandas."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping

from open_lm import storage
from open_lm.tracking.sink import RunFacts


class CsvSink:
    """`metrics.csv`: a column for each metric, empty where a step has none of it. A resumed run goes on."""

    def __init__(self, run: RunFacts):
        self._path = os.path.join(run.folder, "metrics.csv")
        self._rows = _read(self._path)
        self._columns = list(dict.fromkeys(["step", *(name for row in self._rows.values() for name in row)]))
        self._write_all()

    def rewind(self, step: int) -> None:
        """Drop the rows of steps after `step`."""
        self._file.close()
        self._rows = {number: row for number, row in self._rows.items() if number <= step}
        self._write_all()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        known = step in self._rows
        row = self._rows.setdefault(step, {"step": str(step)})
        row |= {name: repr(value) if math.isfinite(value) else "" for name, value in metrics.items()}
        new = [name for name in row if name not in self._columns]
        self._columns += new
        if new or known:
            self._file.close()
            self._write_all()
        else:
            self._file.write(_lines(self._columns, [row]))

    def _write_all(self) -> None:
        head = dict(zip(self._columns, self._columns, strict=True))
        storage.write_text(self._path, _lines(self._columns, [head, *self._rows.values()]))
        self._file = open(self._path, "a", buffering=1, newline="")  # noqa: SIM115

    def close(self) -> None:
        self._file.close()


def _lines(columns: list[str], rows: list[dict[str, str]]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()


def _read(path: str) -> dict[int, dict[str, str]]:
    """The rows of an earlier start, by step; a last line that was cut off is left out."""
    if not os.path.exists(path):
        return {}
    with open(path, newline="") as file:
        whole = (row for row in csv.DictReader(file) if None not in row.values() and (row.get("step") or "").isdigit())
        return {int(row["step"]): {name: value for name, value in row.items() if value} for row in whole}
