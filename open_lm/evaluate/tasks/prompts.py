"""Prompts from rows: examples, delimiters and spaces exactly as LLM Foundry sets them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from open_lm.evaluate.tasks.kinds import TaskPrompt, type_of
from open_lm.evaluate.tasks.task import EvalTask


def prompts(
    task: EvalTask, rows: Sequence[dict[str, Any]], n_shots: int, *, prefix_space: bool
) -> Iterator[TaskPrompt]:
    """The prompt of every row, in order.

    The examples of a row are drawn with one generator that runs through the rows in order, so all rows must be asked.
    `prefix_space`: continuations start with a space (byte-level tokenizers: yes, SentencePiece: no).
    """
    generator, kind = random.Random(task.fewshot_random_seed), type_of(task)
    for index, row in enumerate(rows):
        preamble = task.prompt_string
        if n_shots > 0:
            for shot in sample_shots(len(rows), n_shots, index, generator):
                preamble += kind.shot(task, rows[shot], preamble)
        yield kind.prompt(task, row, preamble, prefix_space)


def sample_shots(n_rows: int, n_shots: int, index: int, generator: random.Random) -> set[int]:
    """Rows shown before row `index`, never itself; the order is that of iterating the set."""
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
