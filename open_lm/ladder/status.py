"""Status of a ladder: how far each size is, and when it will be done."""

from __future__ import annotations

from collections.abc import Sequence

from open_lm import text
from open_lm.ladder.ladder import ModelLadder
from open_lm.ladder.plan import SizePlan
from open_lm.ladder.sizes import COUNTINGS


def status(ladder: ModelLadder, sizes: Sequence[str]) -> str:
    """A line a size: checkpoints and metrics found of those expected, percent trained, time left."""
    rows = [("size", "parameters", "checkpoints", "metrics", "trained", "time left")]
    for size in sizes:
        plan, found = ladder.plan(size), ladder.get_checkpoints(size)
        n_saved, n_metrics = sum(c.path is not None for c in found), sum(c.metrics_path is not None for c in found)
        done = max([ladder.steps_done(size), *(c.info.step for c in found if c.path)])
        rows.append(
            (
                size,
                f"{plan.n_params:,}",
                f"{n_saved}/{len(found)}",
                f"{n_metrics}/{len(found)}",
                f"{100 * done / plan.steps:.0f} %",
                _left(ladder, size, plan, done),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join([*lines, f"N counted {ladder.config.counting}: {COUNTINGS[ladder.config.counting]}"])


def _left(ladder: ModelLadder, size: str, plan: SizePlan, done: int) -> str:
    if ladder.is_complete(size):
        return "done"
    speed = ladder.speed_so_far(size)
    return text.duration((plan.steps - done) * plan.numbers.batch_tokens / speed) if speed else "unknown"
