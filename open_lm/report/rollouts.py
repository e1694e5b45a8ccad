"""Answers of reinforcement learning in the report: those of the first and of the last iteration that was shown."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from open_lm import storage
from open_lm.report.facts import RunSummary, read_json_lines

N_SHOWN = 8
"""Answers of one iteration."""


def answer_tables(run: RunSummary) -> str:
    """Both iterations side by side, their mean rewards above them; nothing for a run without rollouts."""
    path = storage.join(run.folder, "rollouts.jsonl")
    rows = read_json_lines(path, needed=("iteration", "prompt", "answer", "reward")) if storage.exists(path) else []
    if not rows:
        return ""
    ends = dict.fromkeys((rows[0]["iteration"], rows[-1]["iteration"]))
    tables = [_table(iteration, [row for row in rows if row["iteration"] == iteration]) for iteration in ends]
    return f'<div class="texts">{"".join(tables)}</div>'


def _table(iteration: int, rows: Sequence[dict[str, Any]]) -> str:
    """Answers of one iteration, spread over its prompts."""
    mean = sum(row["reward"] for row in rows) / len(rows)
    shown = rows[:: max(1, -(-len(rows) // N_SHOWN))]
    lines = "".join(
        f"<tr><td>{escape(row['prompt'][-200:])}</td><td>{escape(row['answer'][:200])}</td>"
        f'<td class="number">{row["reward"]:.3g}</td></tr>'
        for row in shown
    )
    head = '<tr><th>prompt</th><th>answer</th><th class="number">reward</th></tr>'
    title = f"iteration {iteration}: mean reward {mean:.3f} of {len(rows):,} answers"
    return f'<div><p class="note">{escape(title)}</p><table>{head}{lines}</table></div>'
