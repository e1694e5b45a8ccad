"""Batching of sequences: those that begin alike as one tree, each distinct beginning once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from open_lm.evaluate.engine.encode import Choice, Question
from open_lm.model.trees import TokenTree

LARGEST_TREE = 4096
"""Nodes; attention computes with the square of them."""
NODES_OF_A_SHARED_TOKEN = 512
"""A sequence joins a tree of n nodes by m of its own if it shares at least n·m / this of its tokens: attention between
the two is computed and thrown away, which costs what the other layers save, at a width of 150."""


BLOCK_TOKENS = 1 << 20
"""Sequences are sorted in blocks of so many tokens: choices share their contexts in memory, sorted they are copies."""


class Sequenced(NamedTuple):
    """A choice and its `name` = (question, choice)."""

    choice: Choice
    name: tuple[int, int]

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens that the model reads."""
        return self.choice.context + self.choice.continuation[:-1]


class PlannedTree(NamedTuple):
    """Sequences in order of their ids that will be one tree; `is_chain` where each begins as the next does."""

    sequences: tuple[Sequenced, ...]
    n_nodes: int
    is_chain: bool


@dataclass(frozen=True)
class ScoringTree:
    """A tree and the choices whose sequences are in it: nodes `places[i]` predict the tokens `targets[i]` of choice
    `names[i]` = (question, choice)."""

    tree: TokenTree
    names: tuple[tuple[int, int], ...]
    places: tuple[tuple[int, ...], ...]
    targets: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ScoringBatch:
    """Trees that run together, in one forward pass."""

    planned: tuple[PlannedTree, ...]

    @property
    def trees(self) -> list[ScoringTree]:
        """The trees, made when they are asked for: they take many times the memory of their sequences."""
        return [_grown(planned.sequences) for planned in self.planned]

    @property
    def n_questions(self) -> int:
        """Number of questions that begin in this batch; over all batches each counts once."""
        return sum(sequence.name[1] == 0 for planned in self.planned for sequence in planned.sequences)

    @property
    def n_nodes(self) -> int:
        """Tokens that the model reads."""
        return sum(planned.n_nodes for planned in self.planned)


def plan_batches(
    questions: Sequence[Question], budget_tokens: int, *, share_beginnings: bool = True
) -> list[ScoringBatch]:
    """Every choice of every question in exactly one batch, the largest batches first.

    A batch holds at most `budget_tokens` tokens, but always at least one sequence; without `share_beginnings` each
    sequence is a tree of its own, and what pads them to the longest counts too.
    """
    most = min(LARGEST_TREE, budget_tokens) if share_beginnings else 0
    trees = [tree for block in _blocks(questions) for tree in planned_trees(block, most)]
    trees.sort(key=lambda tree: (not tree.is_chain, tree.n_nodes))
    batches = list(_within(trees, budget_tokens, padded=not share_beginnings))
    return sorted(batches, key=lambda batch: batch.n_nodes, reverse=True)


def _blocks(questions: Sequence[Question]) -> Iterator[list[Sequenced]]:
    """The choices of all questions, contexts that begin alike near each other; a block is in order of its ids."""
    block: list[Sequenced] = []
    n_tokens = 0
    for number in sorted(range(len(questions)), key=lambda number: questions[number].choices[0].context):
        choices = questions[number].choices
        size = sum(len(choice.context) + len(choice.continuation) for choice in choices)
        if block and n_tokens + size > BLOCK_TOKENS:
            yield sorted(block, key=lambda sequence: sequence.ids)
            block, n_tokens = [], 0
        block += [Sequenced(choice, (number, index)) for index, choice in enumerate(choices)]
        n_tokens += size
    yield sorted(block, key=lambda sequence: sequence.ids)


def planned_trees(sequences: Sequence[Sequenced], most_nodes: int) -> Iterator[PlannedTree]:
    """Neighbours among `sequences`, which are in order of their ids, as one tree where that saves work."""
    group: list[Sequenced] = []
    last: tuple[int, ...] = ()
    n_nodes, is_chain = 0, True
    for sequence in sequences:
        ids = sequence.ids
        n_shared = n_common(last, ids)
        n_new = len(ids) - n_shared
        joins = 0 < n_nodes + n_new <= most_nodes and n_shared * NODES_OF_A_SHARED_TOKEN >= max(1, n_nodes * n_new)
        if group and not joins:
            yield PlannedTree(tuple(group), n_nodes, is_chain)
            group, n_nodes, n_new, is_chain = [], 0, len(ids), True
        is_chain = is_chain and (not group or n_shared == len(last))
        group.append(sequence)
        n_nodes, last = n_nodes + n_new, ids
    if group:
        yield PlannedTree(tuple(group), n_nodes, is_chain)


def n_common(first: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Number of tokens that both begin with."""
    shorter = min(len(first), len(other))
    if first[:shorter] == other[:shorter]:
        return shorter
    return next(n for n, (a, b) in enumerate(zip(first, other, strict=False)) if a != b)


def _grown(sequences: Sequence[Sequenced]) -> ScoringTree:
    """The tree of `sequences`, which are in order of their ids."""
    growing = _Growing()
    for sequence in sequences:
        growing.add(sequence)
    return growing.done()


class _Growing:
    """A tree to which sequences are added in order."""

    def __init__(self) -> None:
        self._last: tuple[int, ...] = ()
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self.ends: list[int] = []
        self.names: list[tuple[int, int]] = []
        self.places: list[tuple[int, ...]] = []
        self.targets: list[tuple[int, ...]] = []
        self._path: list[int] = []  # the nodes of the last sequence

    def add(self, sequence: Sequenced) -> None:
        """Put `sequence` in, below what it shares with the one before."""
        ids, choice = sequence.ids, sequence.choice
        n_shared = n_common(self._last, ids)
        self._close(n_shared)
        n_before = len(self.tokens)
        self.tokens += ids[n_shared:]
        self.depths += range(n_shared, len(ids))
        self.ends += [0] * (len(self.tokens) - n_before)
        self._path += range(n_before, len(self.tokens))
        self._last = ids
        self.names.append(sequence.name)
        self.places.append(tuple(self._path[len(choice.context) - 1 :]))
        self.targets.append(choice.continuation)

    def done(self) -> ScoringTree:
        """The whole tree."""
        self._close(0)
        tree = TokenTree(tuple(self.tokens), tuple(self.depths), tuple(self.ends))
        return ScoringTree(tree, tuple(self.names), tuple(self.places), tuple(self.targets))

    def _close(self, depth: int) -> None:
        """Nothing more comes below the nodes of the last sequence from `depth` on."""
        for node in self._path[depth:]:
            self.ends[node] = len(self.tokens)
        del self._path[depth:]


def _within(trees: Sequence[PlannedTree], budget: int, *, padded: bool) -> Iterator[ScoringBatch]:
    """`trees`, in order of their size, in batches of at most `budget` tokens."""
    batch: list[PlannedTree] = []
    n_nodes = 0
    for tree in trees:
        n_nodes = (len(batch) + 1) * tree.n_nodes if padded else n_nodes + tree.n_nodes
        if batch and n_nodes > budget:
            yield ScoringBatch(tuple(batch))
            batch, n_nodes = [], tree.n_nodes
        batch.append(tree)
    if batch:
        yield ScoringBatch(tuple(batch))
