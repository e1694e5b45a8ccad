"""Figures of a running server, in Prometheus' text form."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Upper ends of the buckets of every histogram."""
HELP = {
    "openlm_requests_total": "Requests answered, by route and status.",
    "openlm_texts_total": "Texts that ended, by model and reason.",
    "openlm_prompt_tokens_total": "Tokens of prompts, by model and whether they were computed or shared.",
    "openlm_generated_tokens_total": "Tokens written, by model.",
    "openlm_texts_running": "Texts being read or written, by model.",
    "openlm_texts_waiting": "Texts waiting for a slot, by model.",
    "openlm_slots": "Texts that may run at the same time, by model.",
    "openlm_first_token_seconds": "Time from a request to the first token of its text, by model.",
    "openlm_text_seconds": "Time from a request to the end of its text, by model.",
}

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Counters, gauges and histograms by name and labels; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, dict[Labels, float]] = defaultdict(lambda: defaultdict(float))
        self._buckets: dict[str, dict[Labels, list[int]]] = defaultdict(dict)
        self._kinds: dict[str, str] = {}

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            self._kinds[name] = "counter"
            self._values[name][tuple(labels.items())] += amount

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            self._kinds[name] = "gauge"
            self._values[name][tuple(labels.items())] = value

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Count a duration in its bucket."""
        key = tuple(labels.items())
        with self._lock:
            self._kinds[name] = "histogram"
            self._buckets[name].setdefault(key, [0] * (len(SECONDS) + 1))[bisect_left(SECONDS, seconds)] += 1
            self._values[name][key] += seconds

    def text(self) -> str:
        """All of them, as Prometheus reads them."""
        with self._lock:
            return "".join(line + "\n" for name in sorted(self._kinds) for line in self._lines(name))

    def _lines(self, name: str) -> Iterator[str]:
        yield f"# HELP {name} {HELP[name]}"
        yield f"# TYPE {name} {self._kinds[name]}"
        for key, value in self._values[name].items():
            if self._kinds[name] != "histogram":
                yield f"{name}{_written(key)} {value:.17g}"
                continue
            total = 0
            for end, n in zip((*SECONDS, "+Inf"), self._buckets[name][key], strict=True):
                total += n
                yield f"{name}_bucket{_written((*key, ('le', str(end))))} {total}"
            yield f"{name}_sum{_written(key)} {value:.17g}"
            yield f"{name}_count{_written(key)} {total}"


def _written(labels: Labels) -> str:
    def escaped(value: str) -> str:
        return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    return "{" + ",".join(f'{name}="{escaped(value)}"' for name, value in labels) + "}" if labels else ""
