"""Tensor-parallel plans: how each module's weights are divided among ranks, declared beside the weights.

A module's `tensor_plan()` names its children (or its own stacked parameters) and one of these for each. The model knows
nothing of ranks: train/tensor_parallel.py applies the plans.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SplitRows:
    """Output features are divided; of a matrix that packs several, each of `blocks` rows by itself."""

    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class SplitColumns:
    """Input features are divided, and the partial products summed."""


@dataclass(frozen=True)
class Features:
    """A norm over features that are divided: its weights are too, and its statistics are summed."""


@dataclass(frozen=True)
class Tokens:
    """Weights that every rank holds whole and applies to its part of the positions."""


@dataclass(frozen=True)
class Vocabulary:
    """Rows of the vocabulary are divided: token embedding or output layer."""


@dataclass(frozen=True)
class HiddenWidth:
    """Stacked experts: the hidden width of each is divided."""


Split = SplitRows | SplitColumns | Features | Tokens | Vocabulary | HiddenWidth
TensorPlan = dict[str, Split]
