"""Pictures and summaries of ladders: budgets that no legend holds, powers of ten, sweeps in which runs diverge."""

import numpy as np
from matplotlib import pyplot as plt

from open_lm.ladder import plots, transfer
from open_lm.ladder.__main__ import main
from open_lm.ladder.optimum import isoflop
from open_lm.ladder.plots import plot_isoflop, power_of_ten
from open_lm.ladder.points import Points


def curves(n_budgets):
    flops, spread = (x.ravel() for x in np.meshgrid(np.geomspace(1e18, 1e21, n_budgets), [0.3, 1, 3]))
    n = np.sqrt(flops / 120) * spread
    return isoflop(Points(n, flops / (6 * n), 3 + np.log(spread) ** 2, n * np.nan, tuple(map(str, n))))


def test_many_budgets_are_told_apart_by_a_colour_bar(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure) or path)
    for n_budgets in (plots.MAX_LEGEND, plots.MAX_LEGEND + 1):
        plot_isoflop(curves(n_budgets), str(tmp_path / "isoflop.png"))
    few, many = drawn
    assert (len(few.axes), few.axes[0].get_legend() is None) == (2, False)
    assert (len(many.axes), many.axes[0].get_legend() is None) == (3, True)
    assert "FLOPs" in many.axes[2].get_ylabel()
    plt.close("all")


def test_compute_is_written_in_powers_of_ten():
    assert [power_of_ten(x) for x in (1e18, 2e9, 5e21)] == ["$10^{18}$", r"$2\times10^{9}$", r"$5\times10^{21}$"]


def test_a_rate_that_diverged_is_never_the_best_one(tmp_path, monkeypatch, capsys):
    losses = {1e-3: float("nan"), 2e-3: 3.0, 4e-3: 2.5}

    def sweep(setup, shapes, rates):
        rows = [{"width": w, "depth": d, "lr": r, "loss": losses[r]} for w, d in shapes for r in rates]
        return [row | {"loss": float("nan")} if row["width"] == 64 else row for row in rows]

    monkeypatch.setattr(transfer, "lr_sweep", sweep)
    flags = ["--rates", *map(str, losses), "--widths", "32", "64", "--parametrizations", "standard"]
    main(["lr-sweep", *flags, "--output", str(tmp_path / "sweep.png")])
    out = capsys.readouterr().out
    assert "width    32: best learning rate 0.004, loss 2.5000" in out
    assert "width    64: every learning rate diverged" in out
