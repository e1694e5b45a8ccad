"""Metrics as a table in the run folder: one row a step, for spreadsheets and pandas."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping

from open_lm import storage
from open_lm.report.rows import TOKENS, Counted, tokens_at
from open_lm.tracking.sink import Resumed, RunFacts


class CsvSink:
    """`metrics.csv`: a column for each metric, empty where a step has none of it. A resumed run goes on.

    A row is of one step and its tokens: after a change of the batch the number of a step comes again.
    """

    def __init__(self, run: RunFacts):
        self._path = os.path.join(run.folder, "metrics.csv")
        self._rows = _read(self._path)
        self._columns = list(dict.fromkeys(["step", *(name for row in self._rows.values() for name in row)]))
        self._write_all()

    def rewind(self, to: Resumed) -> None:
        """Drop the rows of what was measured later."""
        self._file.close()
        places = tokens_at(list(self._rows), to.batch_before)
        kept = zip(self._rows.items(), places, strict=True)
        self._rows = {key: row for (key, row), tokens in kept if not to.forgets(tokens)}
        self._write_all()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        key = (step, metrics.get(TOKENS))
        known = key in self._rows
        row = self._rows.setdefault(key, {"step": str(step)})
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


def _read(path: str) -> dict[Counted, dict[str, str]]:
    """The rows of an earlier start, by step and tokens; a last line that was cut off is left out."""
    if not os.path.exists(path):
        return {}
    with open(path, newline="") as file:
        whole = [row for row in csv.DictReader(file) if None not in row.values() and (row.get("step") or "").isdigit()]
    rows = [{name: value for name, value in row.items() if value} for row in whole]
    return {(int(row["step"]), float(row[TOKENS]) if TOKENS in row else None): row for row in rows}
