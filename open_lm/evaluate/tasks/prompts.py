"""Prompts from rows: examples, delimiters and spaces exactly as LLM Foundry sets them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from open_lm.evaluate.tasks.task import EvalTask


@dataclass(frozen=True)
class Prompt:
    """The texts of one question: what precedes it, its context (or contexts), and its possible continuations."""

    preamble: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


def prompts(task: EvalTask, rows: Sequence[dict[str, Any]], n_shots: int, *, prefix_space: bool) -> Iterator[Prompt]:
    """The prompt of every row, in order.

    The examples of a row are drawn with one generator that runs through the rows in order, so all rows must be asked.
    `prefix_space`: continuations start with a space (byte-level tokenizers: yes, SentencePiece: no).
    """
    generator = random.Random(task.fewshot_random_seed)
    for index, row in enumerate(rows):
        preamble = task.prompt_string
        if n_shots > 0:
            for shot in sample_shots(len(rows), n_shots, index, generator):
                preamble += _shot(task, rows[shot], preamble)
        yield _prompt(task, row, preamble, prefix_space)


def sample_shots(n_rows: int, n_shots: int, index: int, generator: random.Random) -> set[int]:
    """Which rows are shown before row `index`, never itself; the order is that of iterating the set."""
    n_shots = min(n_rows - 1, n_shots)
    shots = set(generator.sample(range(n_rows), n_shots))
    if index in shots:
        shots.remove(index)
        if len(shots) >= n_rows - 1:
            return shots
        replacement = generator.choice(range(n_rows))
        while replacement in shots or replacement == index:
            replacement = generator.choice(range(n_rows))
        shots.add(replacement)
    return shots


def _shot(task: EvalTask, row: dict[str, Any], preceding: str) -> str:
    """A row with its right answer, as it stands before another question."""
    delimiter = task.example_delimiter if preceding else ""
    if task.icl_task_type == "schema":  # LLM Foundry puts the two delimiters in this order here, and only here
        context = f"{task.prelimiter}{delimiter}{row[task.choices_key][row['gold']]}"
        return f"{context}{task.continuation_delimiter}{row['continuation']}"
    context = f"{delimiter}{task.prelimiter}{row[task.context_key]}{task.continuation_delimiter}"
    return context + answer_text(task, row)


def answer_text(task: EvalTask, row: dict[str, Any]) -> str:
    """The right answer of a row; with its chain of thought where the file has one."""
    if task.icl_task_type == "multiple_choice":
        return row[task.choices_key][row["gold"]]
    if task.icl_task_type == "generation_task_with_answers" and "chain_of_thought" in row:
        return f"{row['chain_of_thought'] or ''}{task.cot_delimiter}{row[task.answer_key]}"
    return row[task.answer_key]


def _prompt(task: EvalTask, row: dict[str, Any], preamble: str, prefix_space: bool) -> Prompt:
    if task.icl_task_type == "schema":
        return Prompt(
            preamble, _schema_contexts(task, row, preamble), (_spaced(row["continuation"], prefix_space),), row["gold"]
        )
    delimiter = task.example_delimiter if preamble else ""
    context = f"{delimiter}{task.prelimiter}{row[task.context_key]}{task.continuation_delimiter}"
    context = context.rstrip() if task.strip_dataset else context
    match task.icl_task_type:
        case "multiple_choice":
            continuations = tuple(_spaced(choice, prefix_space) for choice in row[task.choices_key])
            return Prompt(preamble, (context,), continuations, row["gold"])
        case "language_modeling":
            return Prompt(preamble, (context,), (_spaced(row[task.answer_key], prefix_space),), 0)
    return Prompt(preamble, (context,), (), 0)


def _schema_contexts(task: EvalTask, row: dict[str, Any], preamble: str) -> tuple[str, ...]:
    options = row[task.choices_key]
    if not preamble:
        return tuple(f"{task.prelimiter}{option}" for option in options)
    delimiter = task.continuation_delimiter
    delimiter = delimiter.rstrip() if task.strip_dataset else delimiter
    return tuple(f"{task.prelimiter}{task.example_delimiter}{option}{delimiter}" for option in options)


def _spaced(text: str, prefix_space: bool) -> str:
    return f" {text}" if prefix_space and not text.startswith(" ") else text
