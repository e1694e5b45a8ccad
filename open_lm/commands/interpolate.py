"""`openlm interpolate`: validation losses along the line between two checkpoints, as a table and a picture.

Between a base model and one fine-tuned from it, a point of the line often keeps most of both (arXiv:2109.01903). Flags
beside these are the evaluation's: `--val-data`, `--val-names`, `--batch-size`, `--precision` and the like.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_lm import storage
from open_lm.errors import ConfigError
from open_lm.flags import Parser, add_group, flag, read_group

if TYPE_CHECKING:
    from open_lm.params import RunConfig

NAME_LENGTH = 30
"""Letters of a set's name that fit above a panel."""
PointLosses = list[tuple[float, dict[str, float]]]
"""For each share of the second checkpoint, the loss on each set."""


@dataclass(frozen=True)
class InterpolateConfig:
    """Interpolation"""

    points: int = flag(11, "Points of the line, both ends included, evenly spaced.", least=2)
    shares: tuple[float, ...] = flag(
        (), "The shares of the second checkpoint to evaluate, in place of --points; below 0 and above 1 extrapolate."
    )
    output: str = flag(
        "interpolation.png",
        "The picture to write: .png, .svg or .pdf. Beside it lie the table, as .csv, and the evaluations' run folder, "
        "without an ending.",
    )

    def __post_init__(self) -> None:
        if Path(self.output).suffix not in (".png", ".svg", ".pdf"):
            raise ConfigError(f"--output {self.output}: need a name that ends in .png, .svg or .pdf.")

    @property
    def line(self) -> list[float]:
        """The shares to evaluate, ascending."""
        return sorted(set(self.shares)) or [point / (self.points - 1) for point in range(self.points)]


def main(argv: Sequence[str] | None = None) -> PointLosses:
    """Evaluate every point, write table and picture, and return the losses."""
    parser = Parser(description=__doc__)
    parser.add_argument("first", help="Run folder or weights file at share 0, the base model say.")
    parser.add_argument("second", help="The one at share 1, fine-tuned from it say.")
    add_group(parser, InterpolateConfig)
    args, others = parser.parse_known_args(argv)
    config = read_group(args, InterpolateConfig)
    losses, is_master = evaluated(args.first, args.second, config, others)
    if is_master:
        storage.write_text(str(Path(config.output).with_suffix(".csv")), table(losses))
        draw(losses, config.output)
        print(table(losses) + f"written: {config.output}")
    return losses


def evaluated(first: str, second: str, config: InterpolateConfig, others: Sequence[str]) -> tuple[PointLosses, bool]:
    """The losses at every point, in one run of the trainer's evaluation, and whether this rank is the first."""
    from open_lm.main import carry_out
    from open_lm.params import command_line, parse_args, read_config
    from open_lm.run.build import architecture_of
    from open_lm.run.opened import start_run

    folder = Path(config.output).with_suffix("")
    given = ["--average", first, second, "--logs-dir", str(folder.parent), "--name", folder.name, *others]
    whole = read_config(parse_args(given))
    if whole.trains or not whole.data.val_data:
        raise ConfigError("openlm interpolate only evaluates: give --val-data, and no training data.")
    points = list(each_point(whole, config.line))
    losses = []
    with start_run(points[0], architecture_of(points[0]), command_line(given)) as opened:
        for number, (share, point) in enumerate(zip(config.line, points, strict=True)):
            result = carry_out(opened.another(point, architecture_of(point)) if number else opened)
            losses.append((share, {one.name: one.loss for one in result.validation}))
        is_master = opened.world.is_master
    return losses, is_master


def each_point(config: RunConfig, shares: Sequence[float]) -> Iterator[RunConfig]:
    """The evaluation of the mean of the two checkpoints at each share of the second."""
    for share in shares:
        checkpoint = replace(config.checkpoint, average_coefficients=(1 - share, share))
        yield replace(config, checkpoint=checkpoint)


def table(losses: PointLosses) -> str:
    """The losses as CSV, a line a point."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = list(losses[0][1])
    writer.writerow(["share", *names])
    writer.writerows([f"{share:.6g}", *(f"{at[name]:.6f}" for name in names)] for share, at in losses)
    return out.getvalue()


def draw(losses: PointLosses, output: str) -> None:
    """A panel for each set, its loss against the share; of two sets, one against the other too."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(losses[0][1])
    n_panels = len(names) + (len(names) == 2)
    columns = min(n_panels, 3)
    rows = math.ceil(n_panels / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4 * columns, 3.4 * rows), squeeze=False, layout="constrained"
    )
    shares = [share for share, _ in losses]
    for axis, name in zip(axes.flat, names, strict=False):
        values = [at[name] for _, at in losses]
        axis.plot(shares, values, "o-", markersize=4)
        if finite := [(value, share) for share, value in zip(shares, values, strict=True) if math.isfinite(value)]:
            least, at_share = min(finite)
            axis.plot(at_share, least, "*", markersize=12, label="least")
            axis.legend()
        axis.set(title=_short(name), xlabel="share of the second checkpoint", ylabel="loss")
    if len(names) == 2:
        _trade_off(axes.flat[2], names, losses)
    for axis in axes.flat[n_panels:]:
        axis.axis("off")
    for axis in axes.flat[:n_panels]:
        axis.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(output).suffix[1:], dpi=130)
    pyplot.close(figure)
    storage.write_bytes(output, picture.getvalue())


def _trade_off(axis: Any, names: Sequence[str], losses: PointLosses) -> None:
    """The loss on the second set against that on the first, each point with its share."""
    xs, ys = ([at[name] for _, at in losses] for name in names)
    axis.plot(xs, ys, "o-", markersize=4)
    for index in {0, len(losses) // 2, len(losses) - 1}:
        axis.annotate(f"{losses[index][0]:g}", (xs[index], ys[index]), textcoords="offset points", xytext=(5, 5))
    axis.margins(0.15)
    axis.set(title="trade-off", xlabel=f"loss on {_short(names[0])}", ylabel=f"loss on {_short(names[1])}")


def _short(name: str) -> str:
    """A set's name where it is short, else its end."""
    return name if len(name) <= NAME_LENGTH else "…" + name[1 - NAME_LENGTH :]
