"""Samples shown while training by reinforcement learning: in the log, in rollouts.jsonl, and in the sinks' tables."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from open_lm import storage
from open_lm.data.tokenizer import Tokenizer
from open_lm.distributed import World
from open_lm.post_training.rewards import Answer

FILENAME = "rollouts.jsonl"
COLUMNS = ("iteration", "prompt", "answer", "reward")
N_LOGGED = 3
"""Answers of an iteration that the log shows."""
N_IN_TABLE = 32
"""Answers of an iteration that a sink gets."""

ShowTable = Callable[[int, str, Sequence[str], Sequence[Sequence[Any]]], None]
"""`table(step, name, columns, rows)` shows rows wherever the run's metrics go."""


class RolloutLog:
    """Shows the answers of every `every`-th iteration, those of all ranks; 0 shows none."""

    def __init__(self, folder: str, every: int, tokenizer: Tokenizer, world: World, table: ShowTable | None = None):
        self._path, self._every = os.path.join(folder, FILENAME), every
        self._tokenizer, self._world, self._table = tokenizer, world, table

    def rewind(self, iteration: int) -> None:
        """Forget what was written from `iteration` on: the run goes on from there."""
        if self._world.is_master and os.path.exists(self._path):
            with open(self._path, "rb") as file:
                kept = [line for line in file if _iteration_of(line) < iteration]
            storage.write_bytes(self._path, b"".join(kept))

    def show(self, iteration: int, step: int, answers: Sequence[Answer], rewards: Sequence[float]) -> None:
        """Show one iteration if it is due; every rank must call this with its own answers."""
        if not self._every or iteration % self._every:
            return
        own = [
            (iteration, self._tokenizer.decode(list(answer.prompt)), answer.text, reward)
            for answer, reward in zip(answers, rewards, strict=True)
        ]
        rows = [row for of_rank in self._world.gather(own) for row in of_rank]
        if not self._world.is_master:
            return
        for _, prompt, answer, reward in spread(rows, N_LOGGED):
            logging.info("iteration %d | reward %.3f | %r -> %r", iteration, reward, prompt[-80:], answer[:80])
        with open(self._path, "ab") as file:
            file.writelines(orjson.dumps(dict(zip(COLUMNS, row, strict=True))) + b"\n" for row in rows)
        if self._table is not None:
            self._table(step, "rollouts", COLUMNS, spread(rows, N_IN_TABLE))


def spread(rows: Sequence[Any], n: int) -> list[Any]:
    """At most `n` of the rows, evenly spread over them."""
    return list(rows[:: max(1, -(-len(rows) // n))])


def _iteration_of(line: bytes) -> float:
    """The iteration of one line; infinity for one that was cut off."""
    try:
        return orjson.loads(line)["iteration"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return float("inf")
