"""`fit`: a law through a ladder's metrics or any table, with intervals, predictions and errors on points held out."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from open_lm import storage
from open_lm.errors import ConfigError
from open_lm.flags import flag
from open_lm.ladder.fitting import Fit, fit, interval
from open_lm.ladder.laws import LAWS, law_named
from open_lm.ladder.minimise import OBJECTIVES
from open_lm.ladder.optimum import SAME_BUDGET, IsoFlopFit, compute_optimal, isoflop
from open_lm.ladder.plots import plot_fit, plot_isoflop
from open_lm.ladder.points import Points, TableColumns, points_of, split, where
from open_lm.ladder.tables import is_metrics
from open_lm.ladder.task_error import FORMS, ErrorFit, fit_error


@dataclass(frozen=True)
class FitFlags:
    """Fit"""

    data: str | None = flag(None, "Table (.csv, .tsv, .json, .pkl) to fit. None: the metrics of --ladder.")
    law: str = flag("chinchilla", "Form of the law.", choices=LAWS)
    objective: str | None = flag(
        None, "What is minimised. None: huber-log for chinchilla, least-squares for overtraining.", choices=OBJECTIVES
    )
    params_column: str = flag("num_params", "Column of parameters N.")
    tokens_column: str = flag("tokens", "Column of training tokens D.")
    flops_column: str | None = flag(None, "Column of compute, from which D = C / 6N; instead of --tokens-column.")
    ratio_column: str | None = flag(None, "Column of tokens per parameter, from which D; instead of --tokens-column.")
    loss_column: str = flag("loss", "Column of the loss.")
    name_column: str | None = flag(None, "Column that names each row in tables.")
    score_columns: tuple[str, ...] = flag((), "Columns of accuracies; their mean's complement is the task error.")
    error_columns: tuple[str, ...] = flag((), "Columns of task errors, of which the mean is taken.")
    error_law: str = flag("exponential", "Form of the task error as a function of the loss.", choices=FORMS)
    error_anchor: tuple[float, ...] = flag((), "One artificial point of the error law: a loss and an error.")
    drop_first: int = flag(0, "Rows to leave out at the top of the table.", least=0)
    where: tuple[str, ...] = flag((), "Rows to use: COLUMN OP VALUE such as dataset=rpj or 'num_params<1e9'; all hold.")
    hold_out: tuple[str, ...] = flag(
        (), "Rows to predict instead of fitting them, by the same conditions; all of them must hold."
    )
    all_checkpoints: bool = flag(False, "Also use the checkpoints of a ladder that are not at the end of a decay.")
    bootstrap: int = flag(400, "Resamples that intervals (95 %) come from; 0: none.", least=0)
    fit_seed: int = flag(0, "Seed of the resamples.", least=0)
    predict: tuple[str, ...] = flag((), "Targets N:D to predict, such as 7e9:140e9.")
    budget: tuple[float, ...] = flag((), "FLOPs to split into compute-optimal N and D.")
    isoflop: bool = flag(False, "Also fit a parabola at each budget, and N as a power of compute.")
    isoflop_tolerance: float = flag(SAME_BUDGET, "Relative distance of compute within one budget.", above=0)
    output_dir: str | None = flag(None, "Folder of fit.json and fit.png. None: that of the ladder, or the current one.")

    def __post_init__(self) -> None:
        if self.score_columns and self.error_columns:
            raise ConfigError("--score-columns and --error-columns exclude each other.")
        if self.flops_column and self.ratio_column:
            raise ConfigError("--flops-column and --ratio-column exclude each other: D comes from one of them.")
        if len(self.error_anchor) not in (0, 2):
            raise ConfigError("--error-anchor needs two numbers: a loss and an error.")
        for budget in self.budget:
            if not (math.isfinite(budget) and budget > 0):
                raise ConfigError(f"--budget {budget} must be a positive number of FLOPs.")

    @property
    def columns(self) -> TableColumns:
        return TableColumns(
            params=self.params_column,
            loss=self.loss_column,
            tokens=self.tokens_column,
            flops=self.flops_column,
            ratio=self.ratio_column,
            error=self.score_columns or self.error_columns,
            errors_given=bool(self.error_columns),
            name=self.name_column,
        )


@dataclass(frozen=True)
class FitResult:
    """All that one call of `fit` found."""

    found: Fit
    held_out: Points
    errors: ErrorFit | None
    curves: IsoFlopFit | None
    report: dict[str, Any]


def targets(words: Sequence[str]) -> list[tuple[float, float]]:
    """N and D of each `N:D`.

    Raises:
        ConfigError: a word is not two positive numbers.
    """
    found = []
    for word in words:
        n, colon, d = word.partition(":")
        try:
            pair = float(n), float(d)
        except ValueError:
            pair = (0.0, 0.0)
        if not colon or not all(math.isfinite(x) and x > 0 for x in pair):
            raise ConfigError(f"--predict {word}: give N:D, two positive numbers such as 7e9:140e9.")
        found.append(pair)
    return found


def fit_table(frame: Any, flags: FitFlags, counting: str | None) -> FitResult:
    """Fit what `flags` ask for to the rows of a table; `counting` says how its parameters were counted."""
    asked = targets(flags.predict)
    frame = where(frame.iloc[flags.drop_first :], flags.where)
    counting = counting or _counting(frame)
    seen, unseen = split(frame, flags.hold_out, "--hold-out")
    points = points_of(seen, flags.columns)
    held_out = points_of(unseen, flags.columns)
    found = fit(law_named(flags.law), points, objective=flags.objective, resamples=flags.bootstrap, seed=flags.fit_seed)
    errors = None
    if flags.columns.error:
        anchor = (flags.error_anchor[0], flags.error_anchor[1]) if flags.error_anchor else None
        errors = fit_error(flags.error_law, points, anchor=anchor, resamples=flags.bootstrap, seed=flags.fit_seed)
    curves = isoflop(points, flags.isoflop_tolerance) if flags.isoflop else None
    report = {
        "law": found.law.name,
        "formula": found.law.formula,
        "objective": found.objective,
        "objective_value": found.value,
        "counting": counting or "as in the table",
        "points": len(points),
        "dropped_rows": flags.drop_first,
        "parameters": found.parameters,
        "intervals_95": found.intervals(),
        "at_bounds": list(found.at_bounds),
        "undetermined": list(found.undetermined),
        "resamples_at_bounds": found.bound_shares(),
        "mean_relative_error": float(np.abs(found.relative_residuals).mean()),
        "held_out": [_prediction(found, errors, *row) for row in _rows(held_out)],
        "predictions": [_prediction(found, errors, "", n, d) for n, d in asked],
        "compute_optimal": [_optimum(found, curves, flops) for flops in flags.budget],
    }
    report |= {"error_law": _error_report(errors)} if errors else {}
    report |= {"isoflop": _isoflop_report(curves)} if curves else {}
    return FitResult(found, held_out, errors, curves, report)


def _counting(frame: Any) -> str | None:
    """The rule by which N was counted in a table of metrics; None where another table does not say.

    Raises:
        ConfigError: in several ways, so that no law goes through its rows.
    """
    found = sorted(set(frame["counting"].astype(str))) if is_metrics(frame) else []
    if len(found) > 1:
        raise ConfigError(f"--data: N is counted {' and '.join(found)}. Choose by --where counting={found[0]}.")
    return found[0] if found else None


def _rows(points: Points) -> list[tuple[str, float, float, float, float]]:
    return list(zip(points.names, points.n, points.d, points.loss, points.error, strict=True))


def _prediction(
    found: Fit, errors: ErrorFit | None, name: str, n: float, d: float, loss: float = math.nan, error: float = math.nan
) -> dict[str, Any]:
    predicted = float(found.predict(n, d)[0])
    drawn = found.predict_all(n, d)
    row: dict[str, Any] = {"name": name} if name else {}
    row |= {"n": float(n), "d": float(d), "loss": predicted, "loss_95": interval(drawn) if len(drawn) else None}
    if math.isfinite(loss):
        row |= {"measured_loss": float(loss), "relative_error": predicted / float(loss) - 1}
    if errors is not None:
        chained, bounds = errors.chained(found, n, d)
        row |= {"error": chained, "error_95": bounds}
        if math.isfinite(error):
            row |= {"measured_error": float(error), "relative_error_of_error": chained / float(error) - 1}
    return row


def _optimum(found: Fit, curves: IsoFlopFit | None, flops: float) -> dict[str, Any]:
    best = compute_optimal(found, flops)
    row: dict[str, Any] = {"flops": flops, "edge": best.edge, "resamples_at_edge": best.resamples_at_edge}
    names = ("n", "n_95", "d", "ratio", "loss")
    values = (best.n, best.n_interval, best.d, best.ratio, best.loss)
    row |= dict.fromkeys(names) if best.edge else dict(zip(names, values, strict=True))
    return row | ({"isoflop_n": curves.optimum(flops)[0]} if curves else {})


def _error_report(errors: ErrorFit) -> dict[str, Any]:
    return {
        "form": errors.form.formula,
        "points": len(errors.points),
        "parameters": errors.parameters,
        "intervals_95": errors.intervals(),
        "at_bounds": list(errors.at_bounds),
    }


def _isoflop_report(curves: IsoFlopFit) -> dict[str, Any]:
    found = [{"flops": c.flops, "n": c.n, "loss": c.loss, "inside": c.inside} for c in curves.curves]
    return {
        "exponent": curves.exponent,
        "scale": curves.scale,
        "curves": found,
        "budgets_without_minimum": list(curves.skipped),
    }


def write_fit(result: FitResult, folder: str) -> list[str]:
    """Write fit.json and fit.png, and isoflop.png where there are curves; the paths."""
    path = os.path.join(folder, "fit.json")
    storage.write_text(path, json.dumps(result.report, indent=1))
    written = [path, plot_fit(result.found, os.path.join(folder, "fit.png"), result.held_out)]
    if result.curves:
        written.append(plot_isoflop(result.curves, os.path.join(folder, "isoflop.png")))
    return written


def as_text(report: dict[str, Any]) -> str:
    """The fit as a table for a person."""
    lines = [f"{report['formula']}   ({report['points']} points, N counted {report['counting']})"]
    lines.append(f"objective {report['objective']}: {report['objective_value']:.11g}")
    for name, value in report["parameters"].items():
        lines.append(f"  {name:<8} {value:<14.6g} {_span(report['intervals_95'].get(name))}")
    if not report["intervals_95"]:
        lines.append("  no intervals: too few points to resample, or --bootstrap 0")
    lines += [f"  WARNING: {name} lies at a bound: the points do not determine it" for name in report["at_bounds"]]
    if report["undetermined"]:
        lines.append(
            f"  WARNING: the points do not tell {', '.join(report['undetermined'])} apart: other values fit as well, "
            "and predictions away from the points are arbitrary. Give more sizes, or other ratios D/N"
        )
    for name, share in report["resamples_at_bounds"].items():
        if name not in report["at_bounds"]:
            lines.append(f"  WARNING: {name} lies at a bound in {share:.0%} of the resamples: its interval ends there")
    lines.append(f"mean relative error of the fit: {report['mean_relative_error']:.3%}")
    for title, key in (("held out", "held_out"), ("prediction", "predictions")):
        lines += [_prediction_line(title, row) for row in report[key]]
    lines += [_optimum_line(row) for row in report["compute_optimal"]]
    if error := report.get("error_law"):
        values = ", ".join(f"{k} {v:.5g} {_span(error['intervals_95'].get(k))}" for k, v in error["parameters"].items())
        lines.append(f"task error, {error['form']} ({error['points']} points): {values}")
        lines += [f"  WARNING: {name} of the error law lies at a bound" for name in error["at_bounds"]]
    if curves := report.get("isoflop"):
        lines.append(
            f"IsoFLOP: N = {curves['scale']:.4g} C^{curves['exponent']:.4f} from {len(curves['curves'])} budgets"
        )
        outside = [c for c in curves["curves"] if not c["inside"]]
        lines += [f"  WARNING: the minimum at {c['flops']:.3g} FLOPs lies outside its sizes" for c in outside]
    return "\n".join(lines)


def _span(bounds: Any) -> str:
    return f"[{bounds[0]:.4g}, {bounds[1]:.4g}]" if bounds else ""


def _optimum_line(row: dict[str, Any]) -> str:
    start = f"compute-optimal for {row['flops']:.3g} FLOPs: "
    if row["edge"]:
        return (
            f"{start}none. WARNING: the law has no optimum inside the range of N sought, it lies at its {row['edge']} N"
        )
    line = f"{start}N {row['n']:.4g} {_span(row['n_95'])}, D {row['d']:.4g} "
    line += f"({row['ratio']:.1f} tokens per parameter), loss {row['loss']:.4f}"
    if share := row["resamples_at_edge"]:
        line += f"\n  WARNING: {share:.0%} of the resamples have no optimum and are not in its interval"
    return line


def _prediction_line(title: str, row: dict[str, Any]) -> str:
    line = f"{title} {row.get('name', '')} N {row['n']:.4g} D {row['d']:.4g}: loss {row['loss']:.4f} "
    line += _span(row["loss_95"])
    if "measured_loss" in row:
        line += f", measured {row['measured_loss']:.4f}, error {row['relative_error']:+.4%}"
    if "error" in row:
        line += f"; task error {row['error']:.4f} {_span(row['error_95'])}"
    if "measured_error" in row:
        line += f", measured {row['measured_error']:.4f} ({row['relative_error_of_error']:+.2%})"
    return " ".join(line.split())
