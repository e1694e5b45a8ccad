"""Fault injection: named events of a run, at which a test kills, stops, delays or spoils something. Without a test
nothing happens: an event costs one call of a function that returns what it was given."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

VARIABLE = "OPENLM_FAULTS"
"""Names the injector, `module:function`; only tests set it."""

Injector = Callable[[str, Any], Any]
"""Called with the event and its value; what it gives back takes the value's place."""

EVENTS = (
    "worker", "data", "step", "loss", "gradients", "validation",
    "load", "read", "save", "upload",
    "file.open", "file.write", "file.sync", "file.rename", "file.renamed", "file.remove",
)  # fmt: skip
"""In the order of a run: the start of a data worker (in that worker), the wait for a batch and the step after it
(value: the steps taken), the loss and the model whose gradients are there; a restore on every rank and what rank 0
reads for it, a save (its label), a copy to a remote; and each operation on a local file (its path) that is written
whole or not at all."""


def _named(name: str | None) -> Injector | None:
    if not name:
        return None
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


_injector = _named(os.environ.get(VARIABLE))


def at(event: str, value: T) -> T:
    """`value`, unless a test is there: then what its injector makes of it."""
    return value if _injector is None else _injector(event, value)
