"""Answers in the report: of the first and last rollouts of a run, and of several models to the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from open_lm import storage
from open_lm.errors import DataError
from open_lm.report import page
from open_lm.report.facts import RunSummary, distinct_names, read_json
from open_lm.report.rows import read_json_lines

N_SHOWN = 8
"""Answers of one iteration."""


def answer_tables(run: RunSummary) -> str:
    """The first and the last iteration shown, side by side under their mean rewards; nothing without rollouts."""
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
    return f"<div>{page.note(title)}{page.scrolled(head + lines)}</div>"


def compared_answers(folders: Sequence[str]) -> str:
    """Mean rewards of each folder of `openlm evaluate --reward --prompts`, and some answers to the same prompts.

    Raises:
        DataError: a folder holds no such evaluation.
    """
    if not folders:
        return ""
    names = distinct_names(folders)
    found = [read_json(storage.join(folder, "rewards.json"), "--answers") for folder in folders]
    for folder, summary in zip(folders, found, strict=True):
        if "answers" not in summary:
            raise DataError(f"--answers {folder}: its rewards.json is of files, not of answers. Give --prompts there.")
    rewards = list(dict.fromkeys(reward for summary in found for reward in summary["rewards"]))
    head = ("model", *(reward.rpartition(":")[2] for reward in rewards), "tokens of an answer", "ended by itself")
    rows = [(name, *_figures(summary, rewards)) for name, summary in zip(names, found, strict=True)]
    return page.table(head, rows) + _side_by_side(names, folders)


def _figures(summary: dict[str, Any], rewards: Sequence[str]) -> list[str]:
    means = [summary["rewards"].get(reward) for reward in rewards]
    shown = [f"{one['mean']:.3f} ± {one['stderr']:.3f}" if one else "–" for one in means]
    return [*shown, f"{summary['answer_tokens']:.1f}", f"{summary['finished_share']:.0%}"]


def _side_by_side(names: Sequence[str], folders: Sequence[str]) -> str:
    """Answers of each model to the prompts that all of them answered."""
    needed = ("prompt_ids", "answer_written", "rewards")
    answers = [
        {tuple(row["prompt_ids"]): row for row in read_json_lines(storage.join(folder, "rewards.jsonl"), needed)}
        for folder in folders
    ]
    shared = [prompt for prompt in answers[0] if all(prompt in of_model for of_model in answers)]
    lines = []
    for prompt in shared[:: max(1, -(-len(shared) // N_SHOWN))]:
        cells = [_asked(answers[0][prompt]), *(of_model[prompt]["answer_written"] for of_model in answers)]
        lines.append("<tr>" + "".join(f"<td>{escape(cell[-200:])}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in ("prompt", *names))
    return page.scrolled(f"<tr>{head}</tr>{''.join(lines)}") if lines else ""


def _asked(row: dict[str, Any]) -> str:
    """The prompt of a row as its file has it."""
    found = row.get("prompt") or row.get("question") or row.get("instruction") or row.get("messages") or ""
    return found if isinstance(found, str) else str(found[-1].get("content", "")) if found else ""
