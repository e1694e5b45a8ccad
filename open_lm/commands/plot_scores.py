"""`openlm plot-scores`: scores that grow with training, one panel a task, one line a run, from results.json files."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_lm import storage, text
from open_lm.errors import ConfigError, DataError
from open_lm.evaluate.records import CheckpointRecords, Record, markdown, read_results, short
from open_lm.flags import Parser, add_group, flag, read_group

Lines = dict[str, list[tuple[float, Record]]]


@dataclass(frozen=True)
class ScorePlotConfig:
    """Scores against tokens"""

    output: str = flag("scores.png", "The picture to write: .png, .svg or .pdf.")
    table: str | None = flag(None, "Also write all scores to this markdown file: a line a task, a column a checkpoint.")
    tasks: tuple[str, ...] = flag((), "Only these labels. None: all.")
    columns: int = flag(4, "Panels side by side.")

    def __post_init__(self) -> None:
        if Path(self.output).suffix not in (".png", ".svg", ".pdf"):
            raise ConfigError(f"--output {self.output}: need a name that ends in .png, .svg or .pdf.")
        if self.columns < 1:
            raise ConfigError(f"--columns {self.columns}: need at least 1.")


def main(argv: Sequence[str] | None = None) -> str:
    """Draw the picture and return its path."""
    parser = Parser(description=__doc__)
    parser.add_argument("results", nargs="+", help="results.json files, or folders that hold one.")
    add_group(parser, ScorePlotConfig)
    args = parser.parse_args(argv)
    config = read_group(args, ScorePlotConfig)
    paths = [_file(path) for path in args.results]
    if config.table:
        runs = [checkpoint for path in paths for checkpoint in read_results(path).runs]
        storage.write_text(config.table, markdown(runs))
    panels = gather(paths, config.tasks)
    draw(panels, config)
    print(f"written: {config.output} ({len(panels)} tasks)")
    return config.output


def gather(paths: Sequence[str], only: Sequence[str]) -> dict[str, Lines]:
    """For each task and metric the points of each run, in order of tokens.

    Raises:
        DataError: a checkpoint does not say on how many tokens it was trained, or no scores are left.
    """
    panels: dict[str, Lines] = defaultdict(lambda: defaultdict(list))
    for path in paths:
        for checkpoint in read_results(path).runs:
            tokens = _tokens(checkpoint, path)
            for record in checkpoint.records:
                if not only or record.label in only:
                    panels[f"{record.key}, {short(record.metric)}"][_run_name(checkpoint)].append((tokens, record))
    if not panels:
        raise DataError(f"{', '.join(paths)}: no scores" + (f" of {', '.join(only)}." if only else "."))
    for lines in panels.values():
        for points in lines.values():
            points.sort(key=lambda point: point[0])
    return {name: dict(lines) for name, lines in panels.items()}


def draw(panels: dict[str, Lines], config: ScorePlotConfig) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    import io

    from matplotlib import pyplot

    columns = min(config.columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.6 * columns, 2.9 * rows + 0.4), squeeze=False)
    for axis, (name, lines) in zip(axes.flat, panels.items(), strict=False):
        _panel(axis, name, lines)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=min(4, len(handles)), frameon=False)
    figure.tight_layout(rect=(0, 0.35 / (2.9 * rows + 0.4), 1, 1))
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(config.output).suffix[1:], dpi=130)
    pyplot.close(figure)
    storage.write_bytes(config.output, picture.getvalue())


def _panel(axis: Any, name: str, lines: Lines) -> None:
    for run_name, points in lines.items():
        tokens = [at for at, _ in points]
        values = [record.value for _, record in points]
        errors = [record.stderr or 0.0 for _, record in points]
        axis.errorbar(tokens, values, yerr=errors, marker="o", markersize=3.5, linewidth=1.4, capsize=2, label=run_name)
    chances = {record.chance for points in lines.values() for _, record in points} - {None}
    for chance in chances:
        axis.axhline(chance, linestyle="--", linewidth=1, color="0.55", label="chance", zorder=0)
    axis.set_title(name, fontsize=9)
    axis.set_xlabel("tokens trained", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.xaxis.set_major_formatter(lambda value, _: text.count(value))
    axis.locator_params(axis="x", nbins=5)
    axis.grid(alpha=0.25)


def _file(path: str) -> str:
    inside = storage.join(path, "results.json")
    if storage.exists(inside):
        return inside
    if not storage.exists(path):
        raise ConfigError(f"{path}: no such file. Give a results.json of `openlm evaluate`, or its folder.")
    return path


def _tokens(checkpoint: CheckpointRecords, path: str) -> float:
    if checkpoint.tokens is None:
        raise DataError(
            f"{path}: checkpoint {checkpoint.name} does not say on how many tokens it was trained, so it has no "
            "place on the axis. Leave it out."
        )
    return float(checkpoint.tokens)


def _run_name(checkpoint: CheckpointRecords) -> str:
    """The run a checkpoint belongs to: its name without the epoch."""
    return checkpoint.name.rpartition("/")[0] or checkpoint.name
