"""Plots of a ladder: the learning rate of a run with its checkpoints, and a fitted law over its points."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from open_lm import text
from open_lm.ladder.fitting import Fit
from open_lm.ladder.laws import Array
from open_lm.ladder.plan import SizePlan
from open_lm.ladder.points import Points

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.dpi": 200,
}
MAX_LEGEND = 14
N_CURVES = 8
HOLLOW: dict[str, Any] = {"markerfacecolor": "none", "markeredgewidth": 1.4, "markersize": 6}


def pyplot() -> Any:
    """matplotlib's pyplot, drawing to files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(STYLE)
    return plt


def save(figure: Any, path: str) -> str:
    """Write a figure, making its folder."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    figure.savefig(path)
    pyplot().close(figure)
    return path


def plot_lr_schedule(plan: SizePlan, path: str) -> str:
    """The learning rate over tokens, with a line at each multiple of Chinchilla and a dot at each checkpoint."""
    schedule, numbers = plan.schedule, plan.numbers
    steps = np.unique(np.concatenate([np.linspace(0, plan.steps, 2000).astype(int), _corners(plan)]))
    rates = np.array([schedule(int(step) - 1) if step else 0.0 for step in steps])
    figure, axes = pyplot().subplots(figsize=(7, 3), layout="constrained")
    axes.plot(steps * numbers.batch_tokens, rates, linewidth=1.2)
    marks = np.array(plan.checkpoint_steps)
    heights = [schedule(int(step) - 1) if step else 0.0 for step in marks]
    axes.plot(marks * numbers.batch_tokens, heights, "o", markersize=4, color="C3", label="checkpoints", clip_on=False)
    for period in numbers.periods:
        axes.axvline(period.end, color="0.6", linewidth=0.8, linestyle=":")
        axes.annotate(
            f"{period.multiple:g}×C", (period.end, 1.01), xycoords=("data", "axes fraction"), ha="center", va="bottom",
            fontsize=8,
        )  # fmt: skip
    axes.set(xlabel="tokens", ylabel="learning rate", ylim=(0, None), xlim=(0, None))
    axes.set_title(f"{plan.config.name} {plan.name}: {text.count(float(plan.n_params))} parameters", pad=18)
    axes.xaxis.set_major_formatter(lambda x, _: text.count(float(x)))
    axes.legend(loc="center", bbox_to_anchor=(0.74, 0.45))
    return save(figure, path)


def _corners(plan: SizePlan) -> Array:
    ends = [period.end // plan.numbers.batch_tokens for period in plan.numbers.periods]
    near = [end + offset for end in ends for offset in (0, 1)]
    starts = [period.decay_start // plan.numbers.batch_tokens for period in plan.numbers.periods]
    warmup = -(-plan.numbers.warmup_tokens // plan.numbers.batch_tokens)
    return np.clip(np.array([*near, *starts, warmup], dtype=int), 0, plan.steps)


def plot_fit(found: Fit, path: str, held_out: Points | None = None) -> str:
    """Loss over tokens with curves of the law by size, and the relative errors of the predictions."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(9.5, 3.8), layout="constrained", width_ratios=(3, 2))
    sizes = _sizes(found.points, held_out)
    if len(sizes) <= MAX_LEGEND:
        colors = pyplot().get_cmap("viridis")(np.linspace(0.05, 0.9, len(sizes)))
        for n, color in zip(sizes, colors, strict=True):
            _draw_size(left, found, held_out, n, color)
        left.legend(title="parameters N", fontsize=7, title_fontsize=8)
    else:
        _draw_many(figure, left, found, held_out)
    left.set(xscale="log", xlabel="training tokens D", ylabel="loss")
    _few_ticks(left)
    values = ", ".join(f"${found.law.shown[name]}={found.parameters[name]:.4g}$" for name in found.law.shown)
    left.set_title(f"{found.law.latex}\n{values}", fontsize=9)
    _draw_errors(right, found, held_out)
    return save(figure, path)


def _draw_many(figure: Any, axes: Any, found: Fit, held_out: Points | None) -> None:
    """Points coloured by N on a logarithmic scale, and curves of the law for a few N."""
    from matplotlib.colors import LogNorm

    points, plt = found.points, pyplot()
    every = np.concatenate([points.n, held_out.n]) if held_out is not None else points.n
    norm = LogNorm(float(every.min()), float(every.max()))
    drawn = axes.scatter(points.d, points.loss, c=points.n, norm=norm, cmap="viridis", s=12, zorder=3)
    if held_out is not None and len(held_out):
        edge = plt.get_cmap("viridis")(norm(held_out.n))
        axes.scatter(held_out.d, held_out.loss, marker="s", s=28, facecolors="none", edgecolors=edge, zorder=3)
    for n in np.geomspace(every.min(), every.max(), N_CURVES):
        near = (points.n > n / 2.5) & (points.n < n * 2.5)
        tokens = points.d[near] if near.any() else points.d
        d = np.geomspace(tokens.min(), tokens.max(), 60)
        axes.plot(d, found.predict(n, d), linewidth=1.2, color=plt.get_cmap("viridis")(norm(n)))
    figure.colorbar(drawn, ax=axes, label="parameters N", pad=0.01)


def _sizes(points: Points, held_out: Points | None) -> Array:
    """Different N, those within 5 % as one."""
    every = np.sort(np.concatenate([points.n, held_out.n]) if held_out is not None else points.n)
    kept: list[float] = []
    for n in every:
        if not kept or n > 1.05 * kept[-1]:
            kept.append(float(n))
    return np.array(kept)


def _draw_size(axes: Any, found: Fit, held_out: Points | None, n: float, color: Any) -> None:
    fitted = found.points.take((found.points.n >= n) & (found.points.n <= 1.05 * n))
    unseen = held_out.take((held_out.n >= n) & (held_out.n <= 1.05 * n)) if held_out is not None else None
    both = [fitted, unseen] if unseen is not None else [fitted]
    tokens = np.concatenate([points.d for points in both])
    exact = float(np.exp(np.log(np.concatenate([points.n for points in both])).mean()))
    d = np.geomspace(tokens.min() / 1.3, tokens.max() * 1.3, 60)
    extrapolated = len(fitted) == 0
    axes.plot(d, found.predict(exact, d), color=color, linewidth=1.2, linestyle="--" if extrapolated else "-")
    if len(found.resampled) and extrapolated:
        low, high = np.percentile(found.predict_all(np.full(len(d), exact), d), [2.5, 97.5], axis=0)
        axes.fill_between(d, low, high, color=color, alpha=0.2, linewidth=0)
    label = text.count(exact)
    axes.plot(fitted.d, fitted.loss, "o", color=color, markersize=4, label=None if extrapolated else label)
    if unseen is not None and len(unseen):
        name = f"{label} (held out)" if extrapolated else None
        axes.plot(unseen.d, unseen.loss, "s", color=color, label=name, **HOLLOW)


def power_of_ten(x: float) -> str:
    """2e19 as 2 × 10^19, in TeX."""
    factor, exponent = f"{x:.1e}".split("e")
    start = "" if factor == "1.0" else rf"{float(factor):g}\times"
    return f"${start}10^{{{int(exponent)}}}$"


def _few_ticks(axes: Any, written: Callable[[float], str] = text.count) -> None:
    """Labels that do not collide on a logarithmic axis of less than two decades."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axes.get_xlim()
    if high < 100 * low:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(lambda x, _: written(float(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_errors(axes: Any, found: Fit, held_out: Points | None) -> None:
    axes.axhline(0, color="0.5", linewidth=0.8)
    axes.plot(found.points.flops, 100 * found.relative_residuals, "o", markersize=4, color="C0", label="fitted")
    if held_out is not None and len(held_out):
        error = found.predict(held_out.n, held_out.d) / held_out.loss - 1
        axes.plot(held_out.flops, 100 * error, "s", color="C3", label="held out", **HOLLOW)
    axes.set(xscale="log", xlabel="training compute 6ND [FLOPs]", ylabel="predicted / measured loss - 1  [%]")
    _few_ticks(axes, power_of_ten)
    axes.legend(fontsize=8)


def plot_isoflop(result: Any, path: str) -> str:
    """The parabolas of an IsoFLOP analysis, and the line through their lowest points."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    flops = np.array([curve.flops for curve in result.curves])
    scale = _compute_scale(flops)
    for curve, color in zip(result.curves, scale.to_rgba(flops), strict=True):
        n = np.geomspace(curve.points.n.min() / 1.2, curve.points.n.max() * 1.2, 80)
        left.plot(curve.points.n, curve.points.loss, "o", markersize=3, color=color)
        left.plot(
            n, np.polyval(curve.coefficients, np.log(n)), linewidth=1, color=color, label=power_of_ten(curve.flops)
        )
        left.plot(curve.n, curve.loss, "*", markersize=8, color=color)
    left.set(xscale="log", xlabel="parameters N", ylabel="loss")
    if len(result.curves) > MAX_LEGEND:
        figure.colorbar(scale, ax=left, label="compute of the budget [FLOPs]", pad=0.01)
    else:
        left.legend(title="FLOPs", fontsize=7, title_fontsize=8)
    right.plot(flops, [curve.n for curve in result.curves], "o", markersize=4)
    line = np.geomspace(flops.min() / 2, flops.max() * 2, 20)
    right.plot(line, result.scale * line**result.exponent, "--", color="C3", label=f"N = g C^{result.exponent:.3f}")
    right.set(xscale="log", yscale="log", xlabel="training compute [FLOPs]", ylabel="compute-optimal parameters")
    right.legend()
    return save(figure, path)


def _compute_scale(flops: Array) -> Any:
    """Colours of budgets by the logarithm of their compute."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    return ScalarMappable(LogNorm(float(flops.min()), float(flops.max())), "viridis")


def plot_sweep(rows: Sequence[Mapping[str, float]], path: str) -> str:
    """Loss over learning rate, one curve a group (a width, or a size)."""
    figure, axes = pyplot().subplots(figsize=(5, 3.6), layout="constrained")
    draw_sweep(axes, rows)
    axes.legend(fontsize=8)
    return save(figure, path)


def draw_sweep(axes: Any, rows: Sequence[Mapping[str, float]]) -> None:
    """A curve for each `group`, with a star at its lowest point."""
    groups = sorted({row["group"] for row in rows})
    colors = pyplot().get_cmap("viridis")(np.linspace(0.05, 0.9, len(groups)))
    for group, color in zip(groups, colors, strict=True):
        x, y = np.array(sorted((row["lr"], row["loss"]) for row in rows if row["group"] == group)).T
        axes.plot(x, y, "o-", markersize=3, linewidth=1, color=color, label=text.count(group))
        if np.isfinite(y).any():
            best = int(np.nanargmin(y))
            axes.plot(x[best], y[best], "*", markersize=11, color=color)
    axes.set(xscale="log", xlabel="peak learning rate", ylabel="loss")


def plot_sweeps(sweeps: Mapping[str, Sequence[Mapping[str, float]]], path: str) -> str:
    """A panel for each parametrization: loss over learning rate, one curve a width, a star at each lowest point."""
    figure, panels = _panels(len(sweeps))
    for axes, (name, rows) in zip(panels, sweeps.items(), strict=True):
        draw_sweep(axes, [{"group": row["width"], "lr": row["lr"], "loss": row["loss"]} for row in rows])
        axes.set_title(name)
        axes.legend(title="width", fontsize=8, title_fontsize=8)
    return save(figure, path)


def plot_coordinates(found: Mapping[str, Sequence[Any]], base_width: int, base_depth: int, path: str) -> str:
    """Mean absolute outputs over widths (upper row) and depths (lower row), a column for each parametrization."""
    figure, grid = pyplot().subplots(
        2, len(found), figsize=(3.6 * len(found) + 1, 5.6), layout="constrained", sharey="row", squeeze=False
    )
    for column, (name, rows) in enumerate(found.items()):
        over = {
            "width": [row for row in rows if row.depth == base_depth],
            "depth": [row for row in rows if row.width == base_width],
        }
        for axes, (key, chosen) in zip(grid[:, column], over.items(), strict=True):
            for part in dict.fromkeys(row.part for row in chosen):
                points = sorted((getattr(row, key), row.size) for row in chosen if row.part == part)
                axes.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1, label=part)
            axes.set(xscale="log", yscale="log", xlabel={"width": "width", "depth": "blocks"}[key])
            axes.set_xticks(sorted({getattr(row, key) for row in chosen}), minor=False)
            axes.minorticks_off()
            axes.xaxis.set_major_formatter("{x:g}")
        grid[0, column].set_title(name)
    for axes in grid[:, 0]:
        axes.set_ylabel("mean |output| after training")
    grid[0, 0].legend(fontsize=7)
    return save(figure, path)


def _panels(n: int) -> tuple[Any, Any]:
    figure, panels = pyplot().subplots(1, n, figsize=(4 * n + 1, 3.6), layout="constrained", sharey=True, squeeze=False)
    return figure, panels[0]
