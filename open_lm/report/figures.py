"""Figures and tables of the report, over one run or several."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from open_lm import text
from open_lm.report import page
from open_lm.report.charts import Rule, Series, line_chart
from open_lm.report.facts import FIRST_SET, RunSummary, smoothed

WIDTH, HEIGHT = 560, 260
"""Of small figures."""


PREDICTING = ("pretrain", "sft")
"""Tasks whose loss is that of predicting tokens, so that a uniform guess has one too."""


def headline(run: RunSummary) -> list[tuple[str, str]]:
    """The figures of one run to see first: (value, what it is)."""
    loss, uniform = run.last(FIRST_SET), run.uniform_loss if run.task in PREDICTING else None
    cards = [
        (write(value), what)
        for metric, what, write in (
            ("train/reward", "mean reward of an answer at the end", "{:.3f}".format),
            ("train/preference_accuracy", "pairs ordered rightly at the end", "{:.1%}".format),
        )
        if (value := run.last(metric)) is not None
    ]
    if loss is not None:
        cards.append((f"{loss:.3f}", f"{_measured(run, FIRST_SET)}, nats a token"))
        cards.append((perplexity(loss, ".1f"), "validation perplexity"))
    if loss is not None and uniform:
        cards.append((f"{loss / uniform:.0%}", f"of ln({run.vocab_size}) = {uniform:.2f}, the loss of a guess"))
    further = [metric for metric in run.validation if metric != FIRST_SET]
    cards += [(_shown(run.last(metric), ".3f"), _measured(run, metric)) for metric in further]
    if run.counts_steps:
        return [*cards, (f"{run.steps:,}", "optimizer steps")]
    cards.append((text.count(run.last("train/tokens") or 0), "tokens trained on"))
    cards.append((text.count(run.last("train/tokens_per_second") or 0), "tokens a second at the end"))
    return cards


def perplexity(loss: float, form: str) -> str:
    """exp(loss); ∞ where a float cannot hold it."""
    return format(math.exp(loss), form) if loss < 700 else "∞"


def _measured(run: RunSummary, metric: str) -> str:
    """A validation loss with the set it is of, where its name is known."""
    name = run.validation.get(metric)
    return f"validation loss on {short_name(name)}" if name else "validation loss"


def short_name(name: str) -> str:
    """The name of a validation set; of one that was named by its path the end of it."""
    return name if len(name) <= 32 else "…/" + "/".join(name.rstrip("/").split("/")[-2:])


def comparison(runs: Sequence[RunSummary]) -> str:
    """A row per run: model, tokens, last losses, speed. A validation set has a column of its own."""
    sets = list(dict.fromkeys(name for run in runs for name in run.validation.values()))
    head = (
        "run",
        "layers × width",
        "tokens",
        "training loss",
        *(f"validation loss on {short_name(name)}" if name else "validation loss" for name in sets),
        "perplexity" if len(sets) < 2 else "perplexity on the first set",
        "tokens a second",
        "MFU",
    )
    firsts = {run.validation[FIRST_SET] for run in runs if FIRST_SET in run.validation}
    warning = "These runs were validated on different sets: compare losses within a column only."
    return page.table(head, [_row(run, sets) for run in runs]) + (page.note(warning) if len(firsts) > 1 else "")


def _row(run: RunSummary, sets: Sequence[str]) -> tuple[str, ...]:
    model, loss = run.config.get("model", {}), run.last(FIRST_SET)
    shape = f"{model['n_layers']} × {model['hidden_dim']}" if "n_layers" in model and "hidden_dim" in model else "–"
    measured = {name: run.last(metric) for metric, name in run.validation.items()}
    return (
        run.name,
        shape,
        text.count(run.last("train/tokens") or 0),
        _shown(run.last("train/loss"), ".4f"),
        *(_shown(measured.get(name), ".4f") for name in sets),
        "–" if loss is None else perplexity(loss, ".2f"),
        text.count(run.last("train/tokens_per_second") or 0),
        _shown(run.last("train/mfu"), ".1%"),
    )


def _x_name(runs: Sequence[RunSummary]) -> str:
    """The name of the horizontal axis."""
    return "steps" if all(run.counts_steps for run in runs) else "tokens"


def _rate(y: float) -> str:
    """A learning rate in few characters: 5e-5, 0.003."""
    exponent = math.floor(math.log10(y)) if y > 0 else 0
    return f"{y / 10.0**exponent:.3g}e{exponent}" if exponent < -3 else f"{y:.3g}"


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def loss_figure(runs: Sequence[RunSummary]) -> str:
    """Training and validation loss over tokens; every validation is a dot."""
    sets = list(dict.fromkeys(name for run in runs for name in run.validation.values()))
    series = [one for k, run in enumerate(runs) for one in _losses(run, k, None if len(runs) == 1 else sets[:1])]
    chart = line_chart(
        series, label=f"Loss over {_x_name(runs)}", x_name=_x_name(runs), write_x=text.count,
        write_y=lambda y: f"{y:.3f}", rules=_rules(runs),
    )  # fmt: skip
    keys = [(one.style, one.name) for one in series if one.points and "dotted" not in one.style]
    others = dict.fromkeys(run.task for run in runs if run.task not in PREDICTING)
    title = f"Loss of {', '.join(others)}" if others else "Loss, nats a token"
    return page.figure(title + (_marks(sets) if len(runs) > 1 else ""), keys, chart)


def _marks(sets: Sequence[str]) -> str:
    """The marks of validation sets, as a title names them."""
    if len(sets) < 2:
        return " (dots: validation)"
    first, *further = (short_name(name) or "a set without a name" for name in sets)
    return f" (dots: validation on {first}; rings: on {', '.join(further)})"


def _losses(run: RunSummary, k: int, dotted: Sequence[str] | None) -> list[Series]:
    """The lines of one run: its training loss and its loss on each validation set. Of several runs a set that is not
    `dotted` has rings."""
    raw = run.over_tokens("train/loss")
    lines = smoothed(raw, max(len(raw) // 20, 1))
    sets = [
        (f"validation{f' on {short_name(name)}' if name else ''}", metric) for metric, name in run.validation.items()
    ]
    if dotted is None:
        styles = ("held-out", "third", "run3", "run4", "run5")
        validated = [(name, metric, styles[n % len(styles)]) for n, (name, metric) in enumerate(sets)]
        drawn = [
            Series("training", raw, "faint", hovered=False),
            Series("training, smoothed", lines, "train"),
        ]
    else:
        rings = {metric: "" if name in dotted else " ring" for metric, name in run.validation.items()}
        validated = [(f"{run.name}, {name}", metric, f"run{k} dotted{rings[metric]}") for name, metric in sets]
        drawn = [Series(run.name, lines, f"run{k}")]
    return drawn + [Series(name, run.over_tokens(metric), style, dots=True) for name, metric, style in validated]


def _rules(runs: Sequence[RunSummary]) -> list[Rule]:
    predicting = [run for run in runs if run.task in PREDICTING]
    levels = {run.vocab_size: run.uniform_loss for run in predicting if run.uniform_loss is not None}
    rules = [Rule(f"ln({vocab_size}) = {loss:.2f}", y=loss) for vocab_size, loss in levels.items()]
    if len(runs) == 1:
        rules += [Rule("checkpoint", x=place) for place in runs[0].checkpoints[:-1]]
    return rules


def metric_figure(
    runs: Sequence[RunSummary], metric: str, title: str, write: Callable[[float], str], *, from_zero: bool = True
) -> str:
    """One metric over tokens, small; nothing where no run logged it."""
    series = [
        Series(run.name if len(runs) > 1 else title, run.over_tokens(metric), f"run{k}") for k, run in enumerate(runs)
    ]
    series = [one for one in series if one.points]
    if not series:
        return ""
    chart = line_chart(
        series, label=f"{title} over {_x_name(runs)}", x_name=_x_name(runs), write_x=text.count, write_y=write,
        from_zero=from_zero, width=WIDTH, height=HEIGHT,
    )  # fmt: skip
    return page.figure(title, [(one.style, one.name) for one in series] if len(runs) > 1 else [], chart)


def small_figures(runs: Sequence[RunSummary]) -> str:
    """Rewards and preferences where there are any, learning rate, gradient norm, throughput, utilisation."""
    throughput = metric_figure(runs, "train/tokens_per_second", "Throughput, tokens a second", text.count)
    figures = [
        metric_figure(runs, "train/reward", "Mean reward of an answer", lambda y: f"{y:.3f}", from_zero=False),
        metric_figure(runs, "train/preference_accuracy", "Pairs ordered rightly", lambda y: f"{y:.1%}"),
        metric_figure(
            runs, "train/reward_margin", "Margin between chosen and rejected", "{:.3g}".format, from_zero=False
        ),
        metric_figure(runs, "train/lr", "Learning rate", _rate),
        metric_figure(runs, "train/grad_norm", "Gradient norm", lambda y: f"{y:.3g}"),
        *(() if any(run.counts_steps for run in runs) else (throughput,)),
        metric_figure(runs, "train/mfu", "Model FLOPs utilisation", lambda y: f"{y:.1%}"),
    ]
    return page.side_by_side([figure for figure in figures if figure])


def score_figures(runs: Sequence[RunSummary]) -> str:
    """A small figure per downstream score logged while training; every score is a dot."""
    names = sorted({metric for run in runs for metric in run.metrics if metric.startswith("icl/")})
    figures = []
    for name in names:
        series = [
            Series(run.name, run.over_tokens(name), f"run{k}", dots=True)
            for k, run in enumerate(runs)
            if run.metrics.get(name)
        ]
        chart = line_chart(
            series, label=f"{name} over {_x_name(runs)}", x_name=_x_name(runs), write_x=text.count,
            write_y=lambda y: f"{y:.3f}", width=WIDTH, height=HEIGHT,
        )  # fmt: skip
        keys = [(one.style, one.name) for one in series] if len(runs) > 1 else []
        figures.append(page.figure(name.removeprefix("icl/"), keys, chart))
    return page.side_by_side(figures)
