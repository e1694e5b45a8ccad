"""Problems of single ranks in a save, told to all before they next exchange anything: all go on, or all raise.

An error that leaves one rank before a collective keeps the others waiting in it; so whatever a rank does alone is done
within `outcome_of` or `problem_of`, and `require_none` comes before what the ranks do next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from open_lm.errors import OpenLMError, StorageError

T = TypeVar("T")

WRITE_ERRORS = (OpenLMError, OSError, RuntimeError, MemoryError)
"""Errors by which a full or broken disk or memory is reported: torch raises a RuntimeError for both."""


def outcome_of(work: Callable[[], T]) -> tuple[T | None, str | None]:
    """The result of `work`, or the message of the error that it raises."""
    try:
        return work(), None
    except WRITE_ERRORS as error:
        return None, str(error) or type(error).__name__


def problem_of(work: Callable[[], Any]) -> str | None:
    """The message of the error that `work` raises; None when it raises none."""
    return outcome_of(work)[1]


def gathered(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """The value of every rank of `group`, on every rank."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def require_none(problem: str | None, group: dist.ProcessGroup | None) -> None:
    """Raise on every rank what went wrong on any.

    Raises:
        StorageError: there was a problem.
    """
    found = next((why for why in gathered(problem, group) if why), None)
    if found:
        raise StorageError(found)
