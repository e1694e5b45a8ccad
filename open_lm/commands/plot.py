"""`openlm plot`: loss, learning rate and throughput of several runs in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_lm import storage, text
from open_lm.errors import ConfigError
from open_lm.flags import Parser, add_group, flag, read_group
from open_lm.report.compare import metrics_file
from open_lm.report.facts import distinct_names, validation_sets
from open_lm.report.rows import LoggedRow, read_rows

PANELS = {"loss": "train/loss", "learning rate": "train/lr", "tokens per second": "train/tokens_per_second"}
"""Title: the metric drawn as a line."""
MARKERS = "os^Dv*PX"
"""Of validation sets, in the order in which the runs name them."""


@dataclass(frozen=True)
class PlotConfig:
    """Loss, learning rate and throughput"""

    output: str = flag("runs.png", "The picture to write: .png, .svg or .pdf.")
    x: str = flag("tokens", "What runs to the right: tokens, or steps.", choices=("tokens", "steps"))
    smooth: int = flag(1, "Reports that each point of the loss is the mean of.", least=1)
    log_loss: bool = flag(False, "Draw the loss on a logarithmic scale.")

    def __post_init__(self) -> None:
        if Path(self.output).suffix not in (".png", ".svg", ".pdf"):
            raise ConfigError(f"--output {self.output}: need a name that ends in .png, .svg or .pdf.")


def main(argv: Sequence[str] | None = None) -> str:
    """Draw the picture and return its path."""
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Run folders, or metrics.jsonl files.")
    add_group(parser, PlotConfig)
    args = parser.parse_args(argv)
    config = read_group(args, PlotConfig)
    draw(args.runs, config)
    print(f"written: {config.output} ({len(args.runs)} runs)")
    return config.output


def draw(runs: Sequence[str], config: PlotConfig) -> None:
    """One panel a quantity, one colour a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(5 * len(PANELS), 4), layout="constrained")
    markers: dict[str, str] = {}
    for index, (path, label) in enumerate(zip(runs, labels_of(runs), strict=True)):
        rows = read_rows(metrics_file(path))
        for panel, metric in zip(axes, PANELS.values(), strict=True):
            places, values = placed(rows, metric, config.x)
            values = smoothed(values, config.smooth if metric == "train/loss" else 1)
            is_dot = "." if len(places) == 1 else None
            panel.plot(places, values, color=f"C{index}", linewidth=1.2, marker=is_dot, label=label)
        draw_validation(axes[0], rows, path, config.x, f"C{index}", markers)
    for panel, title in zip(axes, PANELS, strict=True):
        panel.set(title=title, xlabel=config.x)
        panel.xaxis.set_major_formatter(lambda value, _: text.count(float(value)))
        panel.grid(alpha=0.3)
    axes[0].set_title("loss (marks: validation)")
    if config.log_loss:
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_formatter("{x:.3g}")
        axes[0].yaxis.set_minor_formatter("{x:.3g}")
    axes[2].set_ylim(bottom=0)
    axes[2].yaxis.set_major_formatter(lambda value, _: text.count(float(value)))
    for name, marker in markers.items():
        axes[0].plot([], [], marker, color="0.4", ms=4, label=f"validation on {name}" if name else "validation")
    axes[0].legend(fontsize=8)
    with storage.open_atomic(config.output) as file:
        figure.savefig(file, dpi=120, format=Path(config.output).suffix[1:])
    pyplot.close(figure)


def draw_validation(
    panel: Any, rows: Sequence[LoggedRow], path: str, x: str, colour: str, markers: dict[str, str]
) -> None:
    """Draw each validation loss of a run; `markers` holds the mark of each set and gets those of new ones."""
    metrics = list(dict.fromkeys(name for row in rows for name in row.values))
    for metric, name in validation_sets(metrics, str(Path(metrics_file(path)).parent)).items():
        marker = markers.setdefault(name, MARKERS[len(markers) % len(MARKERS)])
        panel.plot(*placed(rows, metric, x), marker, color=colour, ms=4)


def smoothed(values: Sequence[float], n: int) -> list[float]:
    """Each value as the mean of the `n` up to it."""
    windows = [values[max(0, k + 1 - n) : k + 1] for k in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def placed(rows: Sequence[LoggedRow], metric: str, x: str) -> tuple[list[float], list[float]]:
    """All measured values of `metric`, in order of the tokens trained, against steps or tokens; what was logged twice
    counts as last logged."""
    points = {row.tokens: (row.step, row.values[metric]) for row in rows if metric in row.values}
    places = [points[tokens][0] if x == "steps" else tokens for tokens in sorted(points)]
    return places, [points[tokens][1] for tokens in sorted(points)]


def labels_of(runs: Sequence[str]) -> list[str]:
    """The names of runs, those of their folders, as long as it takes to tell them apart."""
    return distinct_names([str(Path(metrics_file(path)).parent) for path in runs])
