"""`coordinate-check` and `lr-sweep`: pictures of whether a parametrization carries a learning rate over sizes."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from open_lm import storage
from open_lm.errors import ConfigError
from open_lm.flags import Parser, add_group, flag, read_group
from open_lm.ladder.plots import plot_coordinates, plot_sweeps
from open_lm.ladder.transfer_setup import DEPTHS, HEAD_DIM, WIDTHS, Coordinates, TransferSetup
from open_lm.model.variants import PARAMETRIZATIONS


@dataclass(frozen=True)
class TransferFlags:
    """Small models that are trained"""

    parametrizations: tuple[str, ...] = flag(
        ("standard", "completep"), "Parametrizations to compare.", choices=PARAMETRIZATIONS
    )
    widths: tuple[int, ...] = flag(WIDTHS, f"Widths, multiples of {HEAD_DIM}, at the base depth.")
    depths: tuple[int, ...] = flag(DEPTHS, "Numbers of blocks, at the base width.")
    base_width: int = flag(64, "Width at which the learning rate means what it says.", least=1)
    base_depth: int = flag(4, "Number of blocks at which it does.", least=1)
    steps: int = flag(10, "Optimizer steps of each model.", least=1)

    def __post_init__(self) -> None:
        for width in (*self.widths, self.base_width):
            if width < HEAD_DIM or width % HEAD_DIM:
                raise ConfigError(f"--widths {width} is not a multiple of {HEAD_DIM}, the width of a head.")
        if any(depth < 2 for depth in self.depths):
            raise ConfigError(f"--depths {min(self.depths)}: the check looks at a middle block, so at least 2.")

    def setup(self, parametrization: str, lr: float = TransferSetup.lr) -> TransferSetup:
        return TransferSetup(parametrization, self.base_width, self.base_depth, lr, self.steps)


@dataclass(frozen=True)
class CheckFlags:
    """Coordinate check"""

    output: str = flag("coordinates.png", "Picture to write; the figures go beside it as .csv.")


@dataclass(frozen=True)
class SweepFlags:
    """Sweep of learning rates"""

    rates: tuple[float, ...] = flag(
        (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2), "Learning rates at the base width and depth."
    )
    output: str = flag("lr-sweep.png", "Picture to write; the figures go beside it as .csv.")


def _read(name: str, argv: Sequence[str], own: type[Any]) -> tuple[TransferFlags, Any]:
    parser = Parser(prog=f"openlm ladder {name}", description=__doc__)
    add_group(parser, TransferFlags)
    add_group(parser, own)
    args = parser.parse_args(list(argv))
    return read_group(args, TransferFlags), read_group(args, own)


def coordinate_check(argv: Sequence[str]) -> dict[str, list[Coordinates]]:
    """Train small models over widths and depths, print how much the sizes of activations spread, draw them."""
    flags, own = _read("coordinate-check", argv, CheckFlags)
    from open_lm.ladder import transfer
    from open_lm.ladder.transfer import spread

    found = {
        name: transfer.coordinate_check(flags.setup(name), flags.widths, flags.depths)
        for name in flags.parametrizations
    }
    print(f"spread (largest - smallest) / mean of the mean |output| after {flags.steps} steps")
    for name, rows in found.items():
        for part in dict.fromkeys(row.part for row in rows):
            of_widths = [r.size for r in rows if r.part == part and r.depth == flags.base_depth]
            of_depths = [r.size for r in rows if r.part == part and r.width == flags.base_width]
            print(f"  {name:<10} {part:<13} widths {spread(of_widths):7.1%}   depths {spread(of_depths):7.1%}")
    write_rows([{"parametrization": name, **vars(row)} for name, rows in found.items() for row in rows], own.output)
    print(f"written: {plot_coordinates(found, flags.base_width, flags.base_depth, own.output)}")
    return found


def lr_sweep(argv: Sequence[str]) -> dict[str, list[dict[str, float]]]:
    """Train small models of each width at each learning rate, print the best ones, draw the losses."""
    flags, own = _read("lr-sweep", argv, SweepFlags)
    from open_lm.ladder import transfer

    shapes = [(width, flags.base_depth) for width in flags.widths]
    found = {name: transfer.lr_sweep(flags.setup(name), shapes, own.rates) for name in flags.parametrizations}
    for name, rows in found.items():
        for width in flags.widths:
            best = lowest([row for row in rows if row["width"] == width])
            words = (
                f"best learning rate {best['lr']:g}, loss {best['loss']:.4f}"
                if best
                else "every learning rate diverged"
            )
            print(f"{name:<10} width {width:>5}: {words}")
    write_rows([{"parametrization": name, **row} for name, rows in found.items() for row in rows], own.output)
    print(f"written: {plot_sweeps(found, own.output)}")
    return found


def lowest(rows: Sequence[dict[str, float]]) -> dict[str, float] | None:
    """The row of least loss among those that have not diverged."""
    return min((row for row in rows if math.isfinite(row["loss"])), key=lambda row: row["loss"], default=None)


def write_rows(rows: Sequence[dict[str, Any]], picture: str) -> None:
    """Write rows as a CSV beside `picture`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    storage.write_text(os.path.splitext(picture)[0] + ".csv", text.getvalue())
