"""Batching of sequences by length, with little or no padding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from open_lm.evaluate.engine.encode import Question


@dataclass(frozen=True)
class Scored:
    """A context and the continuations to score after it: choices `names` = (question, choice) of the task."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    names: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ScoringBatch:
    """Contexts that run together.

    `shares_context`: every context has the same length, runs once, and its continuations run from its cache.
    Otherwise each context has one continuation and both run as one sequence.
    """

    items: tuple[Scored, ...]
    shares_context: bool

    @property
    def n_forwards(self) -> int:
        """How many times the model runs: single-token continuations need only what follows the context."""
        if not self.shares_context:
            return 1
        return 2 if any(len(c) > 1 for item in self.items for c in item.continuations) else 1

    @property
    def n_questions(self) -> int:
        """How many questions begin in this batch; over all batches each counts once."""
        return sum(choice == 0 for item in self.items for _, choice in item.names)


def scored_items(questions: Sequence[Question], *, share_contexts: bool) -> list[Scored]:
    """The distinct contexts of every question, each with all its continuations; one item a choice without sharing."""
    items = []
    for number, question in enumerate(questions):
        if not share_contexts:
            pairs = enumerate(question.choices)
            items += [Scored(pair.context, (pair.continuation,), ((number, index),)) for index, pair in pairs]
            continue
        by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, choice in enumerate(question.choices):
            by_context[choice.context].append(index)
        for context, chosen in by_context.items():
            continuations = tuple(question.choices[index].continuation for index in chosen)
            items.append(Scored(context, continuations, tuple((number, index) for index in chosen)))
    return items


def plan_batches(
    questions: Sequence[Question], budget_tokens: int, *, share_contexts: bool = True
) -> list[ScoringBatch]:
    """Every choice of every question in exactly one batch, the largest batches first.

    A batch holds at most `budget_tokens` tokens with its padding, but always at least one context.
    """
    items = scored_items(questions, share_contexts=share_contexts)
    shared = [item for item in items if len(item.continuations) > 1]
    single = [item for item in items if len(item.continuations) == 1]
    batches = [ScoringBatch(batch, True) for batch in _by_equal_length(shared, budget_tokens)]
    batches += [ScoringBatch(batch, False) for batch in _by_length(single, budget_tokens)]
    return sorted(batches, key=_n_tokens, reverse=True)


def _by_equal_length(items: Iterable[Scored], budget: int) -> Iterator[tuple[Scored, ...]]:
    by_length: dict[int, list[Scored]] = defaultdict(list)
    for item in items:
        by_length[len(item.context)].append(item)
    for length in sorted(by_length):
        ordered = sorted(by_length[length], key=_longest)
        batch: list[Scored] = []
        for item in ordered:
            n_rows = sum(len(other.continuations) for other in batch) + len(item.continuations)
            if batch and n_rows * (length + _longest(item)) > budget:
                yield tuple(batch)
                batch = []
            batch.append(item)
        yield tuple(batch)


def _by_length(items: Iterable[Scored], budget: int) -> Iterator[tuple[Scored, ...]]:
    batch: list[Scored] = []
    for item in sorted(items, key=_length):
        if batch and (len(batch) + 1) * _length(item) > budget:
            yield tuple(batch)
            batch = []
        batch.append(item)
    if batch:
        yield tuple(batch)


def _longest(item: Scored) -> int:
    return max(len(continuation) for continuation in item.continuations)


def _length(item: Scored) -> int:
    return len(item.context) + _longest(item)


def _n_tokens(batch: ScoringBatch) -> int:
    return sum(len(item.context) + sum(map(len, item.continuations)) for item in batch.items)
