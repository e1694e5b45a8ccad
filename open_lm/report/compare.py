"""Comparison of two runs or checkpoints: the first tensor or step that differs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from open_lm.errors import DataError
from open_lm.report.rows import read_rows

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """One thing that is not equal, and in what way."""

    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


def compare_tensors(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], *, rtol: float = 0.0, atol: float = 0.0
) -> list[Difference]:
    """The tensors that differ, in the order of `first`; then those that only `second` has.

    Values agree within `atol + rtol * |second|`; NaN agrees with NaN.
    """
    found = [Difference(name, "only in the first") if name not in second else None for name in first]
    for k, (name, tensor) in enumerate(first.items()):
        if name in second:
            what = _difference(tensor, second[name], rtol, atol)
            found[k] = Difference(name, what) if what else None
    extra = [Difference(name, "only in the second") for name in second if name not in first]
    return [difference for difference in found if difference] + extra


def _difference(first: Tensor, second: Tensor, rtol: float, atol: float) -> str | None:
    if first.shape != second.shape:
        return f"shape {tuple(first.shape)} and {tuple(second.shape)}"
    if first.dtype != second.dtype:
        return f"type {first.dtype} and {second.dtype}"
    a, b = first.double(), second.double()
    differs = (a - b).abs() > atol + rtol * b.abs()
    differs |= a.isnan() != b.isnan()
    if not differs.any():
        return None
    size = (a - b).abs().nan_to_num(nan=math.inf).max().item()
    return f"{int(differs.sum()):,} of {differs.numel():,} values differ, by up to {size:.3g}"


def metrics_file(run: str | Path) -> str:
    """The metrics.jsonl of a run folder, or the file itself.

    Raises:
        DataError: there is no such file.
    """
    path = Path(run) / "metrics.jsonl" if Path(run).is_dir() else Path(run)
    if not path.exists():
        raise DataError(f"{path} does not exist. Name a run folder, or a metrics.jsonl.")
    return str(path)


def read_metric(run: str | Path, metric: str) -> dict[int, float]:
    """`{step: value}` of one metric of a run folder, or of a metrics.jsonl.

    Raises:
        DataError: there is no such file, or nothing in it has the metric.
    """
    path = metrics_file(run)
    values = {row.step: row.values[metric] for row in read_rows(path) if metric in row.values}
    if not values:
        raise DataError(f"{path} has no {metric}.")
    return values


def compare_series(first: Mapping[int, float], second: Mapping[int, float], *, rtol: float = 0.0) -> list[Difference]:
    """The steps that both have and that differ by more than `rtol` of the second's value, in order."""
    return [
        Difference(f"step {step}", f"{first[step]!r} and {second[step]!r}")
        for step in sorted(set(first) & set(second))
        if not math.isclose(first[step], second[step], rel_tol=rtol, abs_tol=0)
    ]
