"""Batching of sequences by length, with little or no padding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from open_lm.evaluate.engine.encode import Question

PADDED_SHARE = 4
"""Prefixes of a batch are padded by at most this part of the shortest."""
FEW_TOKENS = 128
"""Tails of fewer tokens are joined by longer ones: products of so few rows take longer for each."""
ENOUGH_SHARE = 8
"""Prefixes that fill this part of the tokens of a batch take in no longer ones."""


@dataclass(frozen=True)
class Scored:
    """A prefix and the tails that follow it: choices `names` = (question, choice) of the task.

    The first `n_given` tokens of a tail belong to its context, which begins with the prefix; the others are scored.
    """

    prefix: tuple[int, ...]
    tails: tuple[tuple[int, ...], ...]
    n_given: tuple[int, ...]
    names: tuple[tuple[int, int], ...]

    @property
    def n_scored(self) -> list[int]:
        """Number of scored tokens of each tail."""
        return [len(tail) - given for tail, given in zip(self.tails, self.n_given, strict=True)]


@dataclass(frozen=True)
class ScoringBatch:
    """Items that run together.

    `shares_context`: prefixes run once, padded on the left where they are not equally long, and the tails run from
    their caches. Otherwise each item has one tail, and both run as one sequence.
    """

    items: tuple[Scored, ...]
    shares_context: bool

    @property
    def n_forwards(self) -> int:
        """Number of runs of the model."""
        return 1 + len(self.tail_groups) if self.shares_context else 1

    @property
    def tail_groups(self) -> list[list[int]]:
        """Tails that run together after the prefixes, by their number in the batch, about equally long; those of one
        token are not among them: they need only what follows the prefix."""
        n_inputs = [len(tail) - 1 for item in self.items for tail in item.tails]
        groups: list[list[int]] = []
        for row in sorted((row for row, n in enumerate(n_inputs) if n), key=lambda row: n_inputs[row]):
            shortest = n_inputs[groups[-1][0]] if groups else 0
            alike = n_inputs[row] <= shortest + max(1, shortest // PADDED_SHARE)
            if groups and (alike or len(groups[-1]) * shortest < FEW_TOKENS):
                groups[-1].append(row)
            else:
                groups.append([row])
        return groups

    @property
    def n_questions(self) -> int:
        """Number of questions that begin in this batch; over all batches each counts once."""
        return sum(choice == 0 for item in self.items for _, choice in item.names)


def scored_items(questions: Sequence[Question], *, share_contexts: bool) -> list[Scored]:
    """The sequences to run for every question; one item a choice without sharing.

    Choices of one context share it. Those of several share what these begin with, if it is most of the longest: the
    contexts of a schema differ in their last words.
    """
    items = []
    for number, question in enumerate(questions):
        by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, choice in enumerate(question.choices):
            by_context[choice.context].append(index)
        if not share_contexts:
            groups = [(question.choices[index].context, [index]) for index in range(len(question.choices))]
        elif 2 * len(prefix := common_prefix(list(by_context))) > max(map(len, by_context)):
            groups = [(prefix, list(range(len(question.choices))))]
        else:
            groups = list(by_context.items())
        items += [_item(number, question, prefix, chosen) for prefix, chosen in groups]
    return items


def common_prefix(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The common prefix of all `sequences`: that of the first and the last of them in sorted order."""
    first, last = min(sequences), max(sequences)
    n_same = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:n_same]


def _item(number: int, question: Question, prefix: tuple[int, ...], chosen: Sequence[int]) -> Scored:
    choices = [question.choices[index] for index in chosen]
    return Scored(
        prefix,
        tuple((*choice.context[len(prefix) :], *choice.continuation) for choice in choices),
        tuple(len(choice.context) - len(prefix) for choice in choices),
        tuple((number, index) for index in chosen),
    )


def plan_batches(
    questions: Sequence[Question], budget_tokens: int, *, share_contexts: bool = True
) -> list[ScoringBatch]:
    """Every choice of every question in exactly one batch, the largest batches first.

    A batch holds at most `budget_tokens` tokens with its padding, but always at least one item.
    """
    items = scored_items(questions, share_contexts=share_contexts)
    shared = [item for item in items if len(item.tails) > 1]
    single = [item for item in items if len(item.tails) == 1]
    batches = [ScoringBatch(batch, True) for batch in _by_prefix(shared, budget_tokens)]
    batches += [ScoringBatch(batch, False) for batch in _by_length(single, budget_tokens)]
    return sorted(batches, key=_n_tokens, reverse=True)


def _by_prefix(items: Iterable[Scored], budget: int) -> Iterator[tuple[Scored, ...]]:
    """Items with equally long prefixes; where they are few, longer ones join them, since small products are slow."""
    batch: list[Scored] = []
    n_rows = longest = 0
    for item in sorted(items, key=lambda item: (len(item.prefix), _longest(item))):
        n_rows, longest = n_rows + len(item.tails), max(longest, _longest(item))
        if batch:
            shortest = len(batch[0].prefix)
            too_long = len(item.prefix) > shortest + max(1, shortest // PADDED_SHARE)
            enough = len(batch) * shortest * ENOUGH_SHARE > budget
            too_many = n_rows * (len(item.prefix) + longest) > budget
            if too_many or (len(item.prefix) > shortest and (too_long or enough)):
                yield tuple(batch)
                batch, n_rows, longest = [], len(item.tails), _longest(item)
        batch.append(item)
    if batch:
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
    return max(map(len, item.tails))


def _length(item: Scored) -> int:
    return len(item.prefix) + _longest(item)


def _n_tokens(batch: ScoringBatch) -> int:
    return sum(len(item.prefix) + sum(map(len, item.tails)) for item in batch.items)
