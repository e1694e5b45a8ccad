"""Rows of a metrics.jsonl in the order they were measured, each with the tokens the run had trained on by then."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from open_lm import storage
from open_lm.errors import DataError

TOKENS = "train/tokens"
Counted = tuple[int, float | None]
"""A step and its tokens, where they were written down."""


@dataclass(frozen=True)
class LoggedRow:
    """The figures logged at once: the step as the run counted it then, and the tokens trained on until then."""

    step: int
    tokens: float
    values: Mapping[str, float]


def read_rows(path: str, batch: float = 1.0) -> list[LoggedRow]:
    """The rows of a metrics.jsonl; what is no number, such as a loss of NaN, is not among the values. `batch` as for
    `tokens_at`.

    Raises:
        DataError: a line is no JSON object with a step.
    """
    rows = read_json_lines(path, needed=("step",))
    places = tokens_at([(row["step"], row.get(TOKENS)) for row in rows], batch)
    return [
        LoggedRow(row["step"], place, {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)})
        for row, place in zip(rows, places, strict=True)
    ]


def tokens_at(counted: Sequence[Counted], batch: float = 1.0) -> list[float]:
    """The tokens of each row of a file. Rows without them, of older programs, were measured between their neighbours;
    in a file without any, a step counts as `batch` tokens."""
    places: list[float] = []
    before: Counted | None = None
    for k, (step, tokens) in enumerate(counted):
        if tokens is None:
            after = next((one for one in counted[k:] if one[0] and one[1]), None)
            tokens = _between(step, before, after, batch)
        elif step:
            before = (step, tokens)
        places.append(tokens)
    return places


def _between(step: int, before: Counted | None, after: Counted | None, batch: float) -> float:
    """`step` in tokens, at the batch of the row before or after it: whichever puts it between the two."""
    low, high = (before and before[1]) or 0, (after and after[1]) or math.inf
    guesses = [step * tokens / steps for steps, tokens in filter(None, (before, after)) if tokens]
    return next((guess for guess in guesses if low <= guess <= high), guesses[0] if guesses else step * batch)


def read_json_lines(path: str, needed: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The objects of a jsonl file; a last line that is not whole yet, or was cut off by a kill, is left out.

    Raises:
        DataError: a line is no JSON object with the keys `needed`.
    """
    rows, lines = [], storage.read_text(path).split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({**row, **{key: row[key] for key in needed}})
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise DataError(f"{path}:{number}: no JSON object as expected ({error!r}). Remove the line.") from error
    return rows
