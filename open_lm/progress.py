"""Progress bars: on a terminal only, once work has taken a few seconds, and alike everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

Progress = tqdm
CountDone = Callable[[int], object]
"""Called with how many more are done."""


def progress(
    items: Iterable[Any] | None = None,
    *,
    unit: str,
    label: str = "",
    total: int | None = None,
    done: int = 0,
    shown: bool = True,
    delay_seconds: float = 5.0,
) -> Progress:
    """A bar over `items`, or one to `update()` up to `total` of which `done` are behind it.

    Iterate over it, or use it in a `with` block. Bytes (`unit="B"`) are written with prefixes. Off a terminal, or
    where not `shown`, it prints nothing.
    """
    return Progress(
        items,
        total=total,
        initial=done,
        unit=unit,
        unit_scale=unit == "B",
        desc=label or None,
        delay=delay_seconds,
        mininterval=0.5,
        smoothing=0.05,
        dynamic_ncols=True,
        disable=None if shown else True,
    )
