"""Scoring over ranks: each question once, and the scores of all on every rank."""

from __future__ import annotations

from collections.abc import Sequence

from open_lm.distributed import World
from open_lm.evaluate.engine.batching import plan_batches
from open_lm.evaluate.engine.encode import Question
from open_lm.evaluate.engine.scoring import Score, Scorer
from open_lm.progress import CountDone

BATCHES_PER_RANK = 8


def score_questions(
    scorer: Scorer,
    world: World,
    questions: Sequence[Question],
    batch_tokens: int,
    progress: CountDone = lambda n_questions: None,
) -> dict[tuple[int, int], Score]:
    """The score of every choice of every question, by (question, choice). Every rank must call this: the model may be
    sharded over them, so all take the same number of forward passes."""
    if not questions:
        return {}
    n_shares = world.shape.n_shares
    one_by_one = scorer.scales_with_length  # a batch is one forward pass, which the ranks count
    budget = 1 if one_by_one else _budget_tokens(questions, batch_tokens, n_shares)
    batches = plan_batches(questions, budget, share_beginnings=scorer.runs_trees)
    mine = batches[world.share_rank :: n_shares]
    scores: dict[tuple[int, int], Score] = {}
    for batch in mine:
        scores.update(scorer.score(batch))
        progress(batch.n_questions)
    scorer.idle(-(-len(batches) // n_shares) - len(mine))
    return {name: score for share in world.gather(scores) for name, score in share.items()}


def _budget_tokens(questions: Sequence[Question], batch_tokens: int, n_shares: int) -> int:
    """Tokens in a batch: with several ranks no more than leaves each some batches, so that they end together."""
    if n_shares == 1:
        return batch_tokens
    total = sum(len(c.context) + len(c.continuation) for question in questions for c in question.choices)
    return min(batch_tokens, max(1, total // (BATCHES_PER_RANK * n_shares)))
