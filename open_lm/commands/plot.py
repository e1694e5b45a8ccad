"""`openlm plot`: loss, learning rate and throughput of several runs in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_lm import storage, text
from open_lm.errors import ConfigError, DataError
from open_lm.flags import Parser, add_group, flag, read_group
from open_lm.report.compare import read_metric

PANELS = {
    "loss": ("train/loss", "valid/loss"),
    "learning rate": ("train/lr", None),
    "tokens per second": ("train/tokens_per_second", None),
}
"""Title: the metric drawn as a line, and one drawn as dots on it."""


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
    for index, path in enumerate(runs):
        tokens = read_metric(path, "train/tokens")
        for panel, (line, dots) in zip(axes, PANELS.values(), strict=True):
            smooth = config.smooth if line == "train/loss" else 1
            points = placed(smoothed(read_metric(path, line), smooth), tokens, config.x)
            (drawn,) = panel.plot(*points, color=f"C{index}", linewidth=1.2, label=label_of(path))
            if dots:
                panel.plot(*placed(metric_or_none(path, dots), tokens, config.x), "o", color=drawn.get_color(), ms=4)
    for panel, title in zip(axes, PANELS, strict=True):
        panel.set(title=title, xlabel=config.x)
        panel.xaxis.set_major_formatter(lambda value, _: text.count(float(value)))
        panel.grid(alpha=0.3)
    axes[0].set_title("loss (dots: validation)")
    if config.log_loss:
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_formatter("{x:.3g}")
        axes[0].yaxis.set_minor_formatter("{x:.3g}")
    axes[2].set_ylim(bottom=0)
    axes[2].yaxis.set_major_formatter(lambda value, _: text.count(float(value)))
    axes[0].legend(fontsize=8)
    with storage.open_atomic(config.output) as file:
        figure.savefig(file, dpi=120, format=Path(config.output).suffix[1:])
    pyplot.close(figure)


def smoothed(values: dict[int, float], n: int) -> dict[int, float]:
    """Each value as the mean of the `n` up to it."""
    steps = sorted(values)
    windows = {step: steps[max(0, k + 1 - n) : k + 1] for k, step in enumerate(steps)}
    return {step: sum(values[s] for s in window) / len(window) for step, window in windows.items()}


def metric_or_none(path: str, metric: str) -> dict[int, float]:
    """The values of `metric`; none where the run has none."""
    try:
        return read_metric(path, metric)
    except DataError:
        return {}


def placed(values: dict[int, float], tokens: dict[int, float], x: str) -> tuple[list[Any], list[float]]:
    """`values` as points, all of them, against steps or tokens; between reports the last batch counts."""
    steps = sorted(values)
    per_step = tokens[max(tokens)] / max(tokens)
    places = steps if x == "steps" else [tokens.get(step, step * per_step) for step in steps]
    return places, [values[step] for step in steps]


def label_of(path: str) -> str:
    """The name of a run: that of its folder."""
    found = Path(path)
    return (found if found.is_dir() else found.parent).resolve().name
