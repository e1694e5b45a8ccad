"""Verifiers: rewards from what the row of a prompt says of the right answer: `function(answer, row) -> float`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any


def exact(answer: str, row: dict[str, Any]) -> float:
    """1 where the answer, without space around it, is the row's `answer`."""
    return float(answer.strip() == str(row["answer"]).strip())


def last_number(answer: str, row: dict[str, Any]) -> float:
    """1 where the last number of the answer is the last of the row's `answer`, as for GSM8K."""
    found, right = (_numbers(text) for text in (answer, str(row["answer"])))
    return float(bool(found and right) and float(found[-1]) == float(right[-1]))


def tests(answer: str, row: dict[str, Any]) -> float:
    """The share of the row's `tests` that the answer passes, each `{"equals" | "contains" | "matches": text}`."""
    checks = [(kind, text) for test in row["tests"] for kind, text in test.items()]
    return sum(_TESTS[kind](answer, text) for kind, text in checks) / len(checks)


_TESTS: dict[str, Callable[[str, str], bool]] = {
    "equals": lambda answer, text: answer.strip() == text.strip(),
    "contains": lambda answer, text: text in answer,
    "matches": lambda answer, text: re.search(text, answer) is not None,
}


def _numbers(text: str) -> list[str]:
    return re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
