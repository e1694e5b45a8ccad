"""Scores of a reward model for files of conversations and preference pairs: `openlm evaluate --reward`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
import orjson

from open_lm import storage
from open_lm.checkpoint.load_model import stored_chat_template, stored_tokenizer
from open_lm.data.marks import IDS
from open_lm.data.tokenizer import Tokenizer, load_tokenizer
from open_lm.distributed import pick_device
from open_lm.errors import DataError
from open_lm.post_training.chat.conversations import Conversation, ConversationPair, conversation_of, pair_of
from open_lm.post_training.chat.labels import label_all
from open_lm.post_training.chat.rows import Row, described, files_named, rows_in
from open_lm.post_training.chat.template import ChatTemplate, load_template
from open_lm.post_training.reward_model import load_reward_model, rewards_of_sequences
from open_lm.post_training.score_config import RewardScoring
from open_lm.preprocess.jsonl import Rejected

CHUNK = 512
"""Rows that are tokenized and scored at once."""


@dataclass
class FileScorer:
    """A reward model with its template, and what has been counted so far."""

    model: Any
    tokenizer: Tokenizer
    template: ChatTemplate
    skip_bad: bool
    left_out: Counter[str] = field(default_factory=Counter)
    n_rows: int = 0
    rewards: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)

    def lines(self, rows: Iterator[Row]) -> Iterator[dict[str, Any]]:
        """Each row that can be scored with its `reward`, or with `reward_chosen` and `reward_rejected`.

        Raises:
            DataError: a row is bad and those are not skipped.
        """
        while chunk := list(islice(rows, CHUNK)):
            self.n_rows += len(chunk)
            known = [(row, found) for row in chunk if (found := self._conversations(row)) is not None]
            labelled = iter(label_all([one for _, found in known for one in found], self.template, self.tokenizer))
            sequences = [(row, self._ids([next(labelled) for _ in found], row)) for row, found in known]
            whole = [(row, sides) for row, sides in sequences if sides]
            scores = iter(rewards_of_sequences(self.model, [ids for _, sides in whole for ids in sides]))
            for row, sides in whole:
                yield {**row.fields, **self._counted([next(scores) for _ in sides], row)}  # type: ignore[dict-item]

    def _conversations(self, row: Row) -> list[Conversation] | None:
        """The conversations of a row: one, or both sides of a pair."""
        fields = row.fields
        if isinstance(fields, Rejected):
            self._reject(fields, row)
            return None
        found: Any = pair_of(fields) if "chosen" in fields and "rejected" in fields else conversation_of(fields)
        if isinstance(found, Rejected):
            self._reject(found, row)
            return None
        return [found.chosen, found.rejected] if isinstance(found, ConversationPair) else [found]

    def _ids(self, found: list[Any], row: Row) -> list[list[int]]:
        """The tokens of each side of a row, its end among them; none where one of them cannot be scored."""
        if bad := next((one for one in found if isinstance(one, Rejected)), None):
            self._reject(bad, row)
            return []
        if max(len(one.tokens) for one in found) > self.model.config.seq_len + 1:
            self.left_out["too_long"] += 1
            return []
        return [(one.tokens & IDS).tolist() for one in found]

    def _reject(self, found: Rejected, row: Row) -> None:
        if not self.skip_bad:
            raise DataError(
                f"{row.where}: {found.reason.replace('_', ' ')}. Repair it, or leave such rows out with --on-bad-line "
                "skip."
            )
        self.left_out[found.reason] += 1

    def _counted(self, scores: list[float], row: Row) -> dict[str, float]:
        if not np.isfinite(scores).all():
            raise DataError(f"{row.where}: the reward model computed {scores}. Its weights are damaged.")
        self.rewards += scores
        if len(scores) == 1:
            return {"reward": scores[0]}
        self.margins.append(scores[0] - scores[1])
        return {"reward_chosen": scores[0], "reward_rejected": scores[1]}

    def summary(self) -> dict[str, Any]:
        """Counts of the rows, and the distribution of the rewards."""
        rewards, margins = np.array(self.rewards), np.array(self.margins)
        found: dict[str, Any] = {"rows": self.n_rows, "left_out": dict(sorted(self.left_out.items()))}
        if len(rewards):
            found |= {"rewards": len(rewards), "mean": rewards.mean(), "std": rewards.std()}
            found |= {"min": rewards.min(), "max": rewards.max()}
        if len(margins):
            found |= {"pairs": len(margins), "accuracy": (margins > 0).mean(), "margin": margins.mean()}
        return {name: value.item() if isinstance(value, np.generic) else value for name, value in found.items()}


def score_files(config: RewardScoring, tokenizer: str | None, folder: str, device: str) -> dict[str, Any]:
    """Write rewards.jsonl and rewards.json into `folder`; the summary.

    Raises:
        DataError: a row is bad and those are not skipped, or none can be scored.
        CheckpointError: --reward holds no value head.
    """
    (reward,) = config.reward
    files = files_named(config.input_files, None, None, "")
    storage.require_writable(folder, "--output-dir")
    loaded = load_tokenizer(tokenizer or stored_tokenizer(reward))
    model = load_reward_model(reward, str(pick_device(device, 0)))
    template = load_template(config.chat_template, loaded, stored_chat_template(reward))
    scorer = FileScorer(model, loaded, template, config.on_bad_line == "skip")
    rows = chain.from_iterable(map(rows_in, files))
    path = storage.join(folder, "rewards.jsonl")
    with storage.open_atomic(path) as file:
        for line in scorer.lines(rows):
            file.write(orjson.dumps(line) + b"\n")
        if not scorer.rewards:
            raise DataError(f"--input-files: no row can be scored ({dict(scorer.left_out)} of {scorer.n_rows}).")
    summary = {"reward_model": reward, "input_files": described(files), **scorer.summary()}
    content = orjson.dumps(summary, option=orjson.OPT_INDENT_2)
    storage.write_bytes(storage.join(folder, "rewards.json"), content)
    return summary


def shown(summary: dict[str, Any]) -> str:
    """The summary as one line."""
    n_left = sum(summary["left_out"].values())
    text = f"{summary['rewards']:,} rewards, mean {summary['mean']:.4f} ± {summary['std']:.4f}"
    if "pairs" in summary:
        text += f"; {summary['pairs']:,} pairs, accuracy {summary['accuracy']:.4f}, margin {summary['margin']:.4f}"
    return f"{text}; {n_left:,} of {summary['rows']:,} rows left out {summary['left_out'] or ''}".rstrip()
