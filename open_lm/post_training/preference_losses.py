"""Losses over preference pairs, each as its paper has it.  Shapes: P pairs.

With h = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected)); a sequence's log-probability is
the sum over its tokens, or where a loss says so their mean. To add one: a function of `Pairs` and `PreferenceConfig`
here, marked by `rewards` where what it compares is a mean per token or its beta is not 0.1, and its line in
PREFERENCE_LOSSES of config.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from open_lm.post_training.config import PreferenceConfig

L = TypeVar("L", bound=Callable[..., Any])


class Side(NamedTuple):
    """One side of all pairs: log-probabilities of whole sequences under model and reference, and their tokens, (P,)."""

    policy: Tensor
    reference: Tensor
    length: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """Sum over tokens of log pi - log ref."""
        return self.policy - self.reference

    @property
    def mean(self) -> Tensor:
        """Mean over tokens of log pi."""
        return self.policy / self.length

    @property
    def mean_log_ratio(self) -> Tensor:
        return self.log_ratio / self.length


class Pairs(NamedTuple):
    """Both sides of pairs. `weight` is 0 for a pair that cannot be read, else 1."""

    chosen: Side
    rejected: Side
    weight: Tensor


def rewards(*, beta: float = 0.1, per_token: bool = False) -> Callable[[L], L]:
    """Says what a loss compares, for the rewards that are logged: sums, or means `per_token`, times its own `beta`."""

    def mark(loss: L) -> L:
        loss.default_beta, loss.per_token = beta, per_token  # type: ignore[attr-defined]
        return loss

    return mark


@rewards()
def dpo(pairs: Pairs, config: PreferenceConfig) -> Tensor:
    """-log sigmoid(beta h) (arXiv:2305.18290); sums."""
    return -F.logsigmoid(config.beta_or(0.1) * _h(pairs))


@rewards(beta=5.0, per_token=True)
def dpo_norm(pairs: Pairs, config: PreferenceConfig) -> Tensor:
    """dpo over means per token (Tülu 3, arXiv:2411.15124)."""
    return -F.logsigmoid(config.beta_or(5.0) * (pairs.chosen.mean_log_ratio - pairs.rejected.mean_log_ratio))


@rewards()
def cdpo(pairs: Pairs, config: PreferenceConfig) -> Tensor:
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h): a share e of labels is the wrong way round; sums
    (Mitchell, 2023, ericmitchell.ai/cdpo.pdf)."""
    h, e = config.beta_or(0.1) * _h(pairs), config.smoothing_or(0.1)
    return -(1 - e) * F.logsigmoid(h) - e * F.logsigmoid(-h)


@rewards()
def robust(pairs: Pairs, config: PreferenceConfig) -> Tensor:
    """(-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e): unbiased under wrong labels; sums
    (arXiv:2403.00409)."""
    h, e = config.beta_or(0.1) * _h(pairs), config.smoothing_or(0.1)
    return (-(1 - e) * F.logsigmoid(h) + e * F.logsigmoid(-h)) / (1 - 2 * e)


@rewards(per_token=True)
def ipo(pairs: Pairs, config: PreferenceConfig) -> Tensor:
    """(h - 1 / (2 beta))^2 (arXiv:2310.12036); h of means per token, as its authors advise and TRL has it."""
    h = pairs.chosen.mean_log_ratio - pairs.rejected.mean_log_ratio
    return (h - 1 / (2 * config.beta_or(0.1))).square()


@rewards()
def hinge(pairs: Pairs, config: PreferenceConfig) -> Tensor:
    """max(0, 1 - beta h) (SLiC, arXiv:2305.10425); sums."""
    return F.relu(1 - config.beta_or(0.1) * _h(pairs))


@rewards(beta=2.0, per_token=True)
def simpo(pairs: Pairs, config: PreferenceConfig) -> Tensor:
    """-log sigmoid(beta (mean log pi(chosen) - mean log pi(rejected)) - gamma) (arXiv:2405.14734); no reference."""
    difference = config.beta_or(2.0) * (pairs.chosen.mean - pairs.rejected.mean)
    return -F.logsigmoid(difference - config.simpo_gamma)


@rewards(per_token=True)
def orpo(pairs: Pairs, config: PreferenceConfig) -> Tensor:
    """-mean log pi(chosen) - beta log sigmoid(log odds(chosen) - log odds(rejected)), odds of the mean probability
    (arXiv:2403.07691); no reference."""
    ratio = _log_odds(pairs.chosen.mean) - _log_odds(pairs.rejected.mean)
    return -pairs.chosen.mean - config.beta_or(0.1) * F.logsigmoid(ratio)


def _h(pairs: Pairs) -> Tensor:
    return pairs.chosen.log_ratio - pairs.rejected.log_ratio


def _log_odds(log_p: Tensor) -> Tensor:
    return log_p - torch.log1p(-log_p.exp().clamp(max=1 - 1e-7))


def kto(log_ratio_B: Tensor, is_chosen_B: Tensor, kl: Tensor, config: PreferenceConfig) -> Tensor:
    """w (1 - sigmoid(beta (r - z))) of desirable and w' (1 - sigmoid(beta (z - r))) of undesirable answers
    (arXiv:2402.01306): r is the summed log-ratio, z the KL divergence from the reference, measured on answers to other
    prompts of the batch."""
    beta = config.beta_or(0.1)
    desirable_B = config.desirable_weight * (1 - torch.sigmoid(beta * (log_ratio_B - kl)))
    undesirable_B = config.undesirable_weight * (1 - torch.sigmoid(beta * (kl - log_ratio_B)))
    return torch.where(is_chosen_B, desirable_B, undesirable_B)
