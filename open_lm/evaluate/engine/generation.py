"""Generated answers, scored by exact match with any alias, as LLM Foundry does.

Shapes: B prompts, T positions, V vocabulary.
"""

from __future__ import annotations

import re
import string
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from open_lm.distributed import World
from open_lm.errors import DataError
from open_lm.evaluate.engine.encode import PromptEncoder
from open_lm.evaluate.engine.sampling import Sampling
from open_lm.evaluate.engine.scoring import ContextCache, Scorer
from open_lm.evaluate.tasks.kinds import TaskPrompt
from open_lm.evaluate.tasks.task import EvalTask
from open_lm.progress import CountDone

COT_ROOM = 10
"""Tokens that an answer may be longer than the longest in the file, where it is to be found behind a delimiter."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt to continue, by its number in the task; `truncated` when its start had to be cut off."""

    number: int
    ids: tuple[int, ...]
    truncated: bool


def longest_answer(task: EvalTask, rows: Sequence[dict[str, Any]], encoder: PromptEncoder) -> int:
    """Number of tokens the model may write: those of the longest answer in the file."""
    with_thought = any("chain_of_thought" in row for row in rows)
    texts = [
        f"{row.get('chain_of_thought') or ''}{task.cot_delimiter}{answer}" if with_thought else answer
        for row in rows
        for answer in row["aliases"]
    ]
    longest = max(len(ids) for ids in encoder.with_special(texts))
    return max(1, longest + (COT_ROOM if task.cot_delimiter else 0))


def encode_prompts(
    asked: Sequence[TaskPrompt], encoder: PromptEncoder, max_seq_len: int, n_new: int, names: Sequence[str]
) -> list[EncodedPrompt]:
    """Every prompt as ids, cut on the left to leave room for `n_new` tokens; `names` say where each came from.

    Raises:
        DataError: there is no room for any prompt, or a prompt is empty.
    """
    room = max_seq_len - n_new
    if room < 1:
        raise DataError(
            f"{names[0]}: answers of up to {n_new} tokens, where prompt and answer together have {max_seq_len} "
            "(max_seq_len, at most the model's context). Leave the task out, or evaluate a model with a longer context."
        )
    preambles = encoder.preambles([prompt.preamble for prompt in asked])
    contexts = encoder.plain([prompt.contexts[0] for prompt in asked])
    whole = [preamble + context for preamble, context in zip(preambles, contexts, strict=True)]
    for ids, name in zip(whole, names, strict=False):
        if not ids:
            raise DataError(f"{name}: the prompt is empty. Give the task a prompt_string.")
    return [EncodedPrompt(number, tuple(ids[-room:]), len(ids) > room) for number, ids in enumerate(whole)]


def plan_generation(prompts: Sequence[EncodedPrompt], n_new: int, budget_tokens: int) -> list[list[EncodedPrompt]]:
    """Every prompt in exactly one batch; those of a batch are equally long, so nothing is padded."""
    by_length: dict[int, list[EncodedPrompt]] = defaultdict(list)
    for prompt in prompts:
        by_length[len(prompt.ids)].append(prompt)
    batches = []
    for length in sorted(by_length, reverse=True):
        size = max(1, budget_tokens // (length + n_new))
        batches += [by_length[length][start : start + size] for start in range(0, len(by_length[length]), size)]
    return batches


class AnswerWriter:
    """Writes with one model, greedily unless `sampling` says otherwise; ranks keep step, so it may be sharded."""

    def __init__(self, scorer: Scorer, encoder: PromptEncoder, world: World, sampling: Sampling | None = None):
        self.scorer, self.encoder, self.world = scorer, encoder, world
        self.sampling = sampling or Sampling()

    def write(
        self, batches: Sequence[list[EncodedPrompt]], n_new: int, stops: Sequence[str], progress: CountDone
    ) -> dict[int, str]:
        """The text after every prompt, by its number, on every rank."""
        mine = batches[self.world.share_rank :: self.world.shape.n_shares]
        rounds = -(-len(batches) // self.world.shape.n_shares)
        written: dict[int, str] = {}
        for index in range(rounds):
            batch = mine[index] if index < len(mine) else []
            texts = self._write_batch(batch, n_new, stops)
            written |= {asked.number: text for asked, text in zip(batch, texts, strict=True)}
            progress(len(batch))
        return {number: text for share in self.world.gather(written) for number, text in share.items()}

    @torch.no_grad()
    def _write_batch(self, batch: list[EncodedPrompt], n_new: int, stops: Sequence[str]) -> list[str]:
        cache = ContextCache(self.scorer.n_layers) if self.scorer.runs_trees else None
        ids_BT = torch.tensor([asked.ids for asked in batch], dtype=torch.long, device=self.scorer.device)
        tokens: list[list[int]] = [[] for _ in batch]
        ended = [False] * len(batch)
        whole_BT = ids_BT
        numbers = [asked.number for asked in batch]
        for step in range(n_new):
            active = bool(batch) and not all(ended)
            if not self.world.any(active):
                break
            if not active:
                self.scorer.idle(1)
                continue
            with self.scorer.precision.autocast():
                logits_BV = self.scorer.after(ids_BT if cache else whole_BT, cache)
            next_B = self.sampling.choose(logits_BV, numbers, step)
            ids_BT = next_B[:, None]
            whole_BT = torch.cat((whole_BT, ids_BT), 1)
            self._take(next_B, tokens, ended, stops)
        return [self._text(row) for row in tokens]

    def _take(self, next_B: Tensor, tokens: list[list[int]], ended: list[bool], stops: Sequence[str]) -> None:
        """Append the new token of each row that has not ended; note which end with it."""
        for row, token in enumerate(next_B.tolist()):
            if ended[row]:
                continue
            if token == self.encoder.tokenizer.eot_id:
                ended[row] = True
                continue
            tokens[row].append(token)
            if stops:
                text = self._text(tokens[row])
                ended[row] = any(stop in text for stop in stops)

    def _text(self, tokens: list[int]) -> str:
        text = self.encoder.text(tokens)
        return text if self.encoder.prefix_space else " " + text


def is_right(text: str, aliases: Sequence[str], task: EvalTask) -> bool:
    """Whether an answer begins with one of its aliases, after the clean-up the task asks for."""
    if task.early_stopping_criteria:
        text = re.split("|".join(task.early_stopping_criteria), text)[0]
    if task.cot_delimiter:
        text = text.split(task.cot_delimiter)[-1]
    clean = normalized if task.do_normalization else str.strip
    return any(clean(text).startswith(clean(alias)) for alias in aliases)


def normalized(answer: str) -> str:
    """Lower case, without punctuation, articles and superfluous space, as TriviaQA compares answers."""
    answer = answer.replace("_", " ").lower()
    punctuation = set(string.punctuation + "‘’´`")
    answer = "".join(" " if character in punctuation else character for character in answer)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())
