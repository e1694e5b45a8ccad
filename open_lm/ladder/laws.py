"""Scaling laws: loss as a function of parameters N and tokens D, with derivatives, for many parameter vectors at once.

Shapes: S parameter vectors, P parameters of a law, K points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from open_lm.errors import ConfigError

Array = NDArray[np.float64]
INFINITY = float("inf")
WIDE = 200.0
"""Bound of a logarithm of A or B: far outside of what any units of N and D make of them."""


class Law(Protocol):
    """A form of L(N, D). `logs`: parameters that are logarithms, so that a difference of 1 is a factor.

    `exchangeable`: parameters of the terms of N and D that can change places where D is proportional to N.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    latex: ClassVar[str]
    shown: ClassVar[dict[str, str]]
    names: ClassVar[tuple[str, ...]]
    logs: ClassVar[frozenset[str]]
    exchangeable: ClassVar[tuple[str, ...]]
    lower: ClassVar[tuple[float, ...]]
    upper: ClassVar[tuple[float, ...]]
    objective: ClassVar[str]

    def loss(self, theta_SP: Array, n_K: Array, d_K: Array) -> Array: ...

    def jacobian(self, theta_SP: Array, n_K: Array, d_K: Array) -> Array: ...

    def starts(self, n_K: Array, d_K: Array, loss_K: Array) -> Array: ...

    def derived(self, theta_P: Array) -> dict[str, float]: ...


@dataclass(frozen=True)
class ChinchillaLaw:
    """The parametric law of Chinchilla (arXiv:2203.15556, approach 3): L = e^a / N^α + e^b / D^β + E."""

    name: ClassVar[str] = "chinchilla"
    formula: ClassVar[str] = "L(N, D) = A / N^alpha + B / D^beta + E"
    latex: ClassVar[str] = r"$L = A\,N^{-\alpha} + B\,D^{-\beta} + E$"
    shown: ClassVar[dict[str, str]] = {"A": "A", "B": "B", "E": "E", "alpha": r"\alpha", "beta": r"\beta"}
    names: ClassVar[tuple[str, ...]] = ("a", "b", "E", "alpha", "beta")
    logs: ClassVar[frozenset[str]] = frozenset(("a", "b"))
    exchangeable: ClassVar[tuple[str, ...]] = ("a", "b", "alpha", "beta")
    lower: ClassVar[tuple[float, ...]] = (-WIDE, -WIDE, 0.0, 0.0, 0.0)
    upper: ClassVar[tuple[float, ...]] = (WIDE, WIDE, INFINITY, 3.0, 3.0)
    objective: ClassVar[str] = "huber-log"

    def _terms(self, theta_SP: Array, n_K: Array, d_K: Array) -> tuple[Array, Array]:
        a, b, _, alpha, beta = (column[:, None] for column in theta_SP.T)
        return np.exp(a - alpha * np.log(n_K)), np.exp(b - beta * np.log(d_K))

    def loss(self, theta_SP: Array, n_K: Array, d_K: Array) -> Array:
        """L, (S, K)."""
        from_n, from_d = self._terms(theta_SP, n_K, d_K)
        return from_n + from_d + theta_SP[:, 2:3]

    def jacobian(self, theta_SP: Array, n_K: Array, d_K: Array) -> Array:
        """dL / dθ, (S, K, P)."""
        from_n, from_d = self._terms(theta_SP, n_K, d_K)
        return np.stack([from_n, from_d, np.ones_like(from_n), -from_n * np.log(n_K), -from_d * np.log(d_K)], axis=-1)

    def starts(self, n_K: Array, d_K: Array, loss_K: Array) -> Array:
        """A grid over α and β, the rest from linear least squares: it does not depend on the units of N and D."""
        exponents = np.geomspace(0.03, 1.5, 24)
        alpha, beta = (grid.ravel() for grid in np.meshgrid(exponents, exponents))
        middle_n, middle_d = np.exp(np.log(n_K).mean()), np.exp(np.log(d_K).mean())
        basis = np.stack(
            [(n_K / middle_n) ** -alpha[:, None], (d_K / middle_d) ** -beta[:, None], np.ones((len(alpha), len(n_K)))],
            axis=-1,
        )
        scale_n, scale_d, floor = _positive_coefficients(basis, loss_K).T
        a, b = np.log(scale_n) + alpha * np.log(middle_n), np.log(scale_d) + beta * np.log(middle_d)
        return np.stack([a, b, floor, alpha, beta], axis=-1)

    def derived(self, theta_P: Array) -> dict[str, float]:
        """A and B, as they are printed in papers."""
        return {"A": float(np.exp(theta_P[0])), "B": float(np.exp(theta_P[1]))}


@dataclass(frozen=True)
class OvertrainingLaw:
    """The law of OpenLM's study of over-training (arXiv:2403.08540): L = a N^b + c 6^(b/2) (M N)^b + E, M = D / N.

    One exponent for N and D, so that loss falls as a power of compute at any fixed ratio M of tokens to parameters.
    """

    name: ClassVar[str] = "overtraining"
    formula: ClassVar[str] = "L(N, M) = a N^b + c 6^(b/2) (M N)^b + E, with M = D / N"
    latex: ClassVar[str] = r"$L = a\,N^{b} + c\,6^{b/2}(MN)^{b} + E$"
    shown: ClassVar[dict[str, str]] = {"a": "a", "b": "b", "c": "c", "E": "E"}
    names: ClassVar[tuple[str, ...]] = ("a", "b", "c", "E")
    logs: ClassVar[frozenset[str]] = frozenset()
    exchangeable: ClassVar[tuple[str, ...]] = ("a", "c")
    lower: ClassVar[tuple[float, ...]] = (0.0, -3.0, 0.0, 0.0)
    upper: ClassVar[tuple[float, ...]] = (INFINITY, 0.0, INFINITY, INFINITY)
    objective: ClassVar[str] = "least-squares"

    def _powers(self, theta_SP: Array, n_K: Array, d_K: Array) -> tuple[Array, Array]:
        b = theta_SP[:, 1:2]
        return np.exp(b * np.log(n_K)), np.exp(b * np.log(np.sqrt(6.0) * d_K))

    def loss(self, theta_SP: Array, n_K: Array, d_K: Array) -> Array:
        """L, (S, K)."""
        of_n, of_d = self._powers(theta_SP, n_K, d_K)
        return theta_SP[:, 0:1] * of_n + theta_SP[:, 2:3] * of_d + theta_SP[:, 3:4]

    def jacobian(self, theta_SP: Array, n_K: Array, d_K: Array) -> Array:
        """dL / dθ, (S, K, P)."""
        of_n, of_d = self._powers(theta_SP, n_K, d_K)
        slope = theta_SP[:, 0:1] * of_n * np.log(n_K) + theta_SP[:, 2:3] * of_d * np.log(np.sqrt(6.0) * d_K)
        return np.stack([of_n, slope, of_d, np.ones_like(of_n)], axis=-1)

    def starts(self, n_K: Array, d_K: Array, loss_K: Array) -> Array:
        """A grid over b, the rest from linear least squares."""
        b = -np.geomspace(0.02, 1.5, 60)
        ones = np.zeros_like(b)
        of_n, of_d = self._powers(np.stack([ones, b, ones, ones], axis=-1), n_K, d_K)
        top_n, top_d = of_n.max(axis=1, keepdims=True), of_d.max(axis=1, keepdims=True)
        basis = np.stack([of_n / top_n, of_d / top_d, np.ones_like(of_n)], axis=-1)
        a, c, floor = _positive_coefficients(basis, loss_K).T
        return np.stack([a / top_n[:, 0], b, c / top_d[:, 0], floor], axis=-1)

    def derived(self, theta_P: Array) -> dict[str, float]:
        return {}


LAWS: dict[str, Law] = {law.name: law for law in (ChinchillaLaw(), OvertrainingLaw())}
"""Laws by the name that --law gives."""


def law_named(name: str) -> Law:
    """The law called `name`.

    Raises:
        ConfigError: there is none.
    """
    if name not in LAWS:
        raise ConfigError(f"--law {name}: no such law. Choose {' or '.join(LAWS)}.")
    return LAWS[name]


def _positive_coefficients(basis_SKC: Array, values_K: Array) -> Array:
    """Least-squares coefficients of each basis, (S, C), pushed up to a small positive number where they are not."""
    weighted = basis_SKC / values_K[:, None]
    gram = np.einsum("skc,ske->sce", weighted, weighted) + 1e-10 * np.eye(basis_SKC.shape[-1])
    solved = np.linalg.solve(gram, weighted.sum(axis=1)[..., None])[..., 0]
    return np.maximum(solved, 1e-3 * float(values_K.min()))
