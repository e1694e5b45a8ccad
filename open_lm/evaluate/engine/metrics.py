"""Task metrics: LLM Foundry's, with a standard error each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from open_lm.evaluate.engine.encode import Question
from open_lm.evaluate.engine.scoring import Score
from open_lm.evaluate.tasks.task import LM_ACCURACY, LM_CALIBRATION, MC_ACCURACY, MC_CALIBRATION

N_BUCKETS = 10


@dataclass(frozen=True)
class Metric:
    """A number, its standard error (None where it is no mean over questions), and how many questions."""

    value: float
    stderr: float | None
    n_questions: int


def measure(
    names: Sequence[str], questions: Sequence[Question], scores: Mapping[tuple[int, int], Score]
) -> dict[str, Metric]:
    """The metrics `names` over all questions, from the score of each choice."""
    asked = [(question, [scores[n, c] for c in range(len(question.choices))]) for n, question in enumerate(questions)]
    return {name: _MEASURES[name](asked) for name in names}


def mean_of(correct: Sequence[bool]) -> Metric:
    """Accuracy: the share of `correct`."""
    share = sum(correct) / len(correct)
    return Metric(share, math.sqrt(share * (1 - share) / max(1, len(correct) - 1)), len(correct))


ScoredQuestions = Sequence[tuple[Question, Sequence[Score]]]


def _lm_accuracy(asked: ScoredQuestions) -> Metric:
    return mean_of([scores[0].all_greedy for _, scores in asked])


def _mc_accuracy(asked: ScoredQuestions) -> Metric:
    return mean_of([_least_perplexity(scores) == question.gold for question, scores in asked])


def _least_perplexity(scores: Sequence[Score]) -> int:
    """The choice of least perplexity, the first of equals; compared in fp32, as LLM Foundry does."""
    with np.errstate(over="ignore"):
        return int(np.argmin(np.exp(np.array([score.cross_entropy for score in scores], dtype=np.float32))))


def _lm_calibration(asked: ScoredQuestions) -> Metric:
    return _calibration([(scores[0].least_confidence, scores[0].all_greedy) for _, scores in asked])


def _mc_calibration(asked: ScoredQuestions) -> Metric:
    judged = []
    for question, scores in asked:
        likely = np.array([score.mean_probability for score in scores], dtype=np.float32)
        judged.append((float(likely.max() / likely.sum()), int(likely.argmax()) == question.gold))
    return _calibration(judged)


def _calibration(judged: Sequence[tuple[float, bool]]) -> Metric:
    """Expected calibration error: the gap between confidence and accuracy, over ten buckets of confidence."""
    totals, correct = np.zeros(N_BUCKETS), np.zeros(N_BUCKETS)
    for confidence, right in judged:
        bucket = min(int(confidence * N_BUCKETS), N_BUCKETS - 1)
        totals[bucket] += 1
        correct[bucket] += right
    filled = totals > 0
    middles = (np.arange(N_BUCKETS) + 0.5) / N_BUCKETS
    gaps = np.abs(correct[filled] / totals[filled] - middles[filled])
    return Metric(float((totals[filled] / totals.sum() * gaps).sum()), None, len(judged))


_MEASURES = {
    LM_ACCURACY: _lm_accuracy,
    MC_ACCURACY: _mc_accuracy,
    LM_CALIBRATION: _lm_calibration,
    MC_CALIBRATION: _mc_calibration,
}
