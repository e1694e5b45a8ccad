"""Prompts of reinforcement learning: which are answered in which iteration is a function of seed and iteration."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson

from open_lm import storage
from open_lm.data.permutations import key
from open_lm.data.sources import Source
from open_lm.errors import CheckpointError, ConfigError, DataError

LEDGER = "ledger.json"


class Prompts:
    """The rows of a prompts.jsonl; in place of a loader of samples where a task samples its own data."""

    def __init__(self, url: str, *, seed: int, per_iteration: int, steps_per_iteration: int):
        self.url, self.seed, self.per_iteration = url, seed, per_iteration
        self.steps_per_iteration = steps_per_iteration
        self.sources: list[Source] = []
        self.unreadable: list[dict[str, Any]] = []
        self.n_sequences: int | None = None
        content = storage.read_bytes(url)
        self._lines = [line for line in content.splitlines() if line.strip()]
        self._digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        if not self._lines:
            raise DataError(f"--prompts {storage.shown(url)}: holds no prompts.")
        self.ledger = ledger_beside(url)
        self._shuffled: tuple[int, np.ndarray] = -1, np.zeros(0, int)

    def __len__(self) -> int:
        return len(self._lines)

    def of_iteration(self, iteration: int) -> list[dict[str, Any]]:
        """The rows of one iteration; all are answered once before any is answered again, in another order."""
        first = iteration * self.per_iteration
        return [self._row(place) for place in range(first, first + self.per_iteration)]

    def rows(self) -> list[dict[str, Any]]:
        """All rows, in the order of the file."""
        return [self._read(line) for line in range(len(self))]

    def _row(self, place: int) -> dict[str, Any]:
        number, index = divmod(place, len(self))
        if number != self._shuffled[0]:
            generator = np.random.Generator(np.random.Philox(key=int(key("prompts", self.seed, number))))
            self._shuffled = number, generator.permutation(len(self))
        return self._read(int(self._shuffled[1][index]))

    def _read(self, line: int) -> dict[str, Any]:
        row = orjson.loads(self._lines[line])
        if not (isinstance(row.get("prompt_ids"), list) and row["prompt_ids"]):
            raise DataError(
                f"--prompts {storage.shown(self.url)}, line {line + 1}: has no prompt_ids. Make it with "
                "openlm prepare-chat --form prompts."
            )
        return row

    def state(self, step: int) -> dict[str, Any]:
        """Position in the prompts after `step` optimizer steps, and the settings that fix their order."""
        return {
            "version": 1, "prompts": self._digest, "seed": self.seed, "per_iteration": self.per_iteration,
            "steps_per_iteration": self.steps_per_iteration, "steps": step, "sources": [],
        }  # fmt: skip

    def check_state(self, state: dict[str, Any]) -> None:
        """Check that a saved state goes on here.

        Raises:
            CheckpointError: the prompts, the seed or the size of an iteration are others.
        """
        here = self.state(state.get("steps", 0))
        for name, value in here.items():
            if state.get(name) != value:
                raise CheckpointError(
                    f"the checkpoint's {name} was {state.get(name)!r}, is now {value!r}. Give the same."
                )

    def tokenizer_name(self, given: str | None) -> str:
        """The tokenizer: --tokenizer, or the one that the prompts were made with.

        Raises:
            ConfigError: neither is known.
        """
        name = given or self.ledger.get("tokenizer")
        if name is None:
            raise ConfigError("--prompts: no ledger.json says which tokenizer they were made with: give --tokenizer.")
        return name

    def stop_ids(self, end_of_text: int) -> Sequence[int]:
        """The tokens that end an answer."""
        return sorted({end_of_text, *self.ledger.get("stop_ids", [])})


def ledger_beside(url: str) -> dict[str, Any]:
    """The ledger.json in the folder of prompts or of a manifest; empty where there is none.

    Raises:
        DataError: it is no JSON object.
    """
    ledger = storage.join(storage.parent(url), LEDGER)
    try:
        found = orjson.loads(storage.read_bytes(ledger)) if storage.exists(ledger) else {}
    except orjson.JSONDecodeError as error:
        raise DataError(f"{storage.shown(ledger)}: is no JSON ({error}). Make the data again, or remove it.") from error
    if not isinstance(found, dict):
        raise DataError(f"{storage.shown(ledger)}: holds no ledger. Make the data again, or remove it.")
    return found
