"""Commands on a ladder file: flags, and one call of the library each."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from open_lm import storage
from open_lm.errors import ConfigError, DataError
from open_lm.flags import Parser, add_group, flag, read_group
from open_lm.ladder.fit_command import FitFlags, FitResult, as_text, fit_table, write_fit
from open_lm.ladder.ladder import ModelLadder, run_all
from open_lm.ladder.plots import plot_lr_schedule, plot_sweep
from open_lm.ladder.points import numbers, read_table, where
from open_lm.ladder.records import FoundCheckpoint
from open_lm.ladder.status import status as status_text
from open_lm.ladder.tables import discovered, finished, frame_of, is_metrics, write_table

C = TypeVar("C")


@dataclass(frozen=True)
class LadderFlags:
    """Ladder"""

    ladder: str = flag("ladder.json", "Ladder file.")
    size: tuple[str, ...] = flag((), "Sizes to act on. None: all of the ladder.")

    def open(self) -> tuple[ModelLadder, tuple[str, ...]]:
        """The ladder and the sizes asked for."""
        ladder = ModelLadder.from_file(self.ladder)
        for name in self.size:
            ladder.config.size(name)
        return ladder, self.size or ladder.sizes


@dataclass(frozen=True)
class DryRunFlags:
    """Dry run"""

    tokens_per_second: float | None = flag(
        None, "Speed that hours are computed from. None: that of run-benchmark or of the run so far.", above=0
    )
    plot: bool = flag(True, "Draw the learning rate of each size to plots/ in the ladder's folder.")


@dataclass(frozen=True)
class BenchmarkFlags:
    """Benchmark"""

    steps: int = flag(20, "Optimizer steps to measure.", least=3)


@dataclass(frozen=True)
class MetricsFlags:
    """Metrics"""

    output: str | None = flag(None, "File to write: .csv, .json or .pkl (a pandas DataFrame). None: print the table.")
    prefix: str = flag("", "Only runs whose names begin so: LADDER-SIZE of a ladder's own, the folder's of others.")
    discover_all: bool = flag(False, "Also the other run folders in the ladder's folder, made by any training.")
    alternative_dirs: tuple[str, ...] = flag((), "Further folders of run folders to read, local or remote.")


@dataclass(frozen=True)
class PlotFlags:
    """Plot"""

    data: str | None = flag(None, "Table of a sweep with a learning rate, a loss and a group; None: learning rates.")
    lr_column: str = flag("lr", "Column of learning rates.")
    loss_column: str = flag("loss", "Column of losses.")
    group_column: str = flag("num_params", "Column that makes curves: widths, or parameters.")
    where: tuple[str, ...] = flag((), "Rows to use: COLUMN OP VALUE; all hold.")
    output: str | None = flag(None, "Picture to write. None: plots/ in the ladder's folder.")


def _read(name: str, argv: Sequence[str], *groups: type[Any]) -> list[Any]:
    parser = Parser(prog=f"openlm ladder {name}", description=__doc__)
    for group in groups:
        add_group(parser, group)
    args = parser.parse_args(list(argv))
    return [read_group(args, group) for group in groups]


def dry_run(argv: Sequence[str]) -> list[str]:
    """Print the plan of each size; return the reports."""
    flags, own = _read("dry-run", argv, LadderFlags, DryRunFlags)
    ladder, sizes = flags.open()
    reports = []
    for size in sizes:
        reports.append(ladder.dry_run(size, own.tokens_per_second))
        print(reports[-1])
        if own.plot:
            path = os.path.join(ladder.work_dir, "plots", f"lr-{size}.png")
            print(f"plot                {plot_lr_schedule(ladder.plan(size), path)}")
        print()
    return reports


def run(argv: Sequence[str]) -> None:
    """Train the sizes, one after the other."""
    (flags,) = _read("run", argv, LadderFlags)
    ladder, sizes = flags.open()
    run_all(ladder, sizes, ladder.run)
    print(status_text(ladder, sizes))


def run_benchmark(argv: Sequence[str]) -> None:
    """Measure the speed of each size."""
    flags, own = _read("run-benchmark", argv, LadderFlags, BenchmarkFlags)
    ladder, sizes = flags.open()

    def measure(size: str) -> None:
        found = ladder.run_benchmark(size, own.steps)
        hours = ladder.plan(size).numbers.total_tokens / found.tokens_per_second / 3600
        print(
            f"{size}: {found.tokens_per_second:,.0f} tokens/s over {found.steps} steps, "
            f"{found.peak_memory_gib:.2f} GiB, {hours:.2f} hours for the whole run",
            flush=True,
        )

    run_all(ladder, sizes, measure)


def status(argv: Sequence[str]) -> str:
    """Print how far each size is."""
    (flags,) = _read("status", argv, LadderFlags)
    report = status_text(*flags.open())
    print(report)
    return report


def checkpoints(argv: Sequence[str]) -> list[FoundCheckpoint]:
    """Print the promised checkpoints and where they are."""
    (flags,) = _read("checkpoints", argv, LadderFlags)
    ladder, sizes = flags.open()
    found = []
    for size in sizes:
        for checkpoint in ladder.get_checkpoints(size):
            found.append(checkpoint)
            info, place = checkpoint.info, checkpoint.path or "(not there yet)"
            print(f"{size}  step {info.step:>9,}  {info.description:<28}  {place}  {checkpoint.metrics_path or ''}")
    return found


def metrics(argv: Sequence[str]) -> Any:
    """Print or write the table of metrics; return the data frame."""
    flags, own = _read("metrics", argv, LadderFlags, MetricsFlags)
    ladder, sizes = flags.open()
    frame = frame_of(_rows(ladder, sizes, own))
    if own.output is None:
        print(frame.to_string(index=False) if len(frame) else "no checkpoint has metrics yet")
    else:
        write_table(frame, own.output)
        print(f"written: {own.output} ({len(frame)} rows)")
    return frame


def _rows(ladder: ModelLadder, sizes: Sequence[str], own: MetricsFlags) -> list[dict[str, Any]]:
    rows = [row for row in ladder.metrics_rows(sizes) if row["name"].startswith(own.prefix)]
    roots = ([ladder.work_dir] if own.discover_all else []) + list(own.alternative_dirs)
    for root in own.alternative_dirs:
        if not storage.exists(root):
            raise ConfigError(f"--alternative-dirs {root}: no such folder.")
    known = {os.path.abspath(os.path.join(ladder.work_dir, size)) for size in ladder.sizes}
    return rows + discovered(roots, own.prefix, ladder.config.counting, known)


def fit(argv: Sequence[str]) -> FitResult:
    """Fit a law; print it, write fit.json and fit.png."""
    flags, own = _read("fit", argv, LadderFlags, FitFlags)
    if own.data is not None:
        frame, counting, folder = _given_table(own), None, own.output_dir or "."
    else:
        ladder, sizes = flags.open()
        frame, counting = ladder_table(ladder, sizes, own.all_checkpoints), ladder.config.counting
        folder = own.output_dir or ladder.work_dir
    result = fit_table(frame, own, counting)
    print(as_text(result.report))
    for path in write_fit(result, folder):
        print(f"written: {path}")
    return result


def ladder_table(ladder: ModelLadder, sizes: Sequence[str], all_checkpoints: bool = False) -> Any:
    """The metrics of a ladder that a law is fitted to.

    Raises:
        ConfigError: there are none yet.
    """
    for size in sizes:
        if changes := ladder.changes(size):
            logging.warning(
                "size %s was trained by another ladder file: %s. Its points are those of that run, as far as this file "
                "names their steps.", size, "; ".join(changes),
            )  # fmt: skip
    frame = frame_of(ladder.metrics_rows(sizes))
    if not len(frame) or not len(frame := finished(frame, all_checkpoints)):
        raise ConfigError("the ladder has no metrics yet: train it with `openlm ladder run`, or give --data.")
    return frame


def _given_table(own: FitFlags) -> Any:
    """The table of --data; one that `metrics` wrote is read as the metrics of a ladder are."""
    frame = read_table(own.data or "")
    if not is_metrics(frame):
        return frame
    frame = finished(frame, own.all_checkpoints)
    if not len(frame):
        raise DataError(f"--data {own.data}: metrics of a ladder without the end of a decay. Give --all-checkpoints.")
    return frame


def plot(argv: Sequence[str]) -> list[str]:
    """Draw the learning rate of each size, or the sweep in a table."""
    flags, own = _read("plot", argv, LadderFlags, PlotFlags)
    if own.data is not None:
        written = [plot_sweep(_sweep(own), own.output or "sweep.png")]
    else:
        ladder, sizes = flags.open()
        if own.output is not None and len(sizes) > 1:
            raise ConfigError("--output names one picture: give one --size with it.")
        folder = os.path.join(ladder.work_dir, "plots")
        written = [plot_lr_schedule(ladder.plan(s), own.output or os.path.join(folder, f"lr-{s}.png")) for s in sizes]
    for path in written:
        print(f"written: {path}")
    return written


def _sweep(own: PlotFlags) -> list[dict[str, float]]:
    """A learning rate, a loss and a group for each row of the table; rows without a finite loss have diverged."""
    frame = where(read_table(own.data or ""), own.where)
    named = {"group": (own.group_column, "--group-column"), "lr": (own.lr_column, "--lr-column")}
    columns = {key: numbers(frame, column, flag) for key, (column, flag) in named.items()}
    for key, values in columns.items():
        if not (values > 0).all():
            column, flag = named[key]
            raise DataError(f"{flag} {column}: {values.min():g} is not positive; the axis is logarithmic.")
    columns["loss"] = numbers(frame, own.loss_column, "--loss-column")
    return [dict(zip(columns, map(float, row), strict=True)) for row in zip(*columns.values(), strict=True)]
