"""Gauntlet averages of task scores, as an LLM Foundry YAML defines them."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from open_lm.errors import ConfigError
from open_lm.evaluate.records import Record

WEIGHTINGS = ("EQUAL", "SAMPLE_SZ", "LOG_SAMPLE_SZ")


def gauntlet_averages(gauntlet: Mapping[str, Any], found: Mapping[str, float]) -> dict[str, float]:
    """The score of every category whose benchmarks were all run, and of every named average over categories.

    `found` is the accuracy of each `label/3-shot`. With `subtract_random_baseline` and `rescale_accuracy` a score is
    centred: 0 is chance, 1 is perfect. (That is also the aggregation of DCLM's CORE, arXiv:2406.11794: one category
    that holds its tasks.)

    Raises:
        ConfigError: the gauntlet is malformed.
    """
    scores = {}
    for category in gauntlet["categories"]:
        benchmarks = [_GauntletEntry(benchmark, gauntlet) for benchmark in category.get("benchmarks", [])]
        if missing := [b.key for b in benchmarks if b.key not in found]:
            logging.warning("no score for gauntlet category %s: %s not run", category["name"], ", ".join(missing))
            continue
        weights = [b.weight for b in benchmarks]
        scores[category["name"]] = sum(b.centred(found[b.key]) * b.weight for b in benchmarks) / sum(weights)
    averages = gauntlet.get("averages") or {"default_average": [c["name"] for c in gauntlet["categories"]]}
    for name, members in averages.items():
        included = [scores[member] for member in members if member in scores]
        if included:
            scores[name] = sum(included) / len(included)
    return scores


def accuracies(records: Iterable[Record]) -> dict[str, float]:
    """The accuracy of each `label/3-shot`; of one with categories the plain mean over them."""
    return means_of_categories(
        (f"{record.label}/{record.shots}-shot", record.value) for record in records if "Accuracy" in record.metric
    )


def means_of_categories(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The plain mean of the values under each key."""
    parts: dict[str, list[float]] = defaultdict(list)
    for key, value in values:
        parts[key].append(value)
    return {key: sum(found) / len(found) for key, found in parts.items()}


class _GauntletEntry:
    """One benchmark of a gauntlet category."""

    def __init__(self, entry: Mapping[str, Any], gauntlet: Mapping[str, Any]):
        try:
            self.key = f"{entry['name']}/{entry['num_fewshot']}-shot"
            self.baseline = float(entry.get("random_baseline", 0.0))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"eval_gauntlet: benchmark {entry!r}: need name, num_fewshot and random_baseline ({error})."
            ) from error
        self.subtracts = gauntlet.get("subtract_random_baseline", True)
        self.rescales = gauntlet.get("rescale_accuracy", True) and self.subtracts
        self.weight = _weight(self.key, gauntlet)

    def centred(self, score: float) -> float:
        """The score above chance, as a share of what is possible above chance."""
        above = score - self.baseline if self.subtracts else score
        return above / (1 - self.baseline) if self.rescales else above


def _weight(key: str, gauntlet: Mapping[str, Any]) -> float:
    weighting = gauntlet.get("weighting", "EQUAL")
    if weighting not in WEIGHTINGS:
        raise ConfigError(f"eval_gauntlet: weighting {weighting!r}: choose one of {', '.join(WEIGHTINGS)}.")
    if weighting == "EQUAL":
        return 1.0
    sizes = gauntlet.get("benchmark_sizes")
    if not sizes:
        raise ConfigError(f"eval_gauntlet: weighting {weighting} needs benchmark_sizes.")
    n_questions = max(sum(n for name, n in sizes.items() if name.startswith(key)), 1)
    return n_questions if weighting == "SAMPLE_SZ" else max(math.log2(n_questions), 1)
