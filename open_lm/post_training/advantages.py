"""Advantages: how much better an answer, or a token of it, was than expected.

Shapes: B answers, G answers of one prompt, T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

STD_FLOOR = 1e-4
"""Added to a group's standard deviation."""


def group_relative(rewards_B: Tensor, group: int, *, by_std: bool) -> Tensor:
    """Rewards less the mean of their group, divided by its standard deviation (GRPO, arXiv:2402.03300), or not
    (arXiv:2503.20783). A group whose rewards are equal has none."""
    rewards_PG = rewards_B.view(-1, group)
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    if by_std and group > 1:
        centred_PG = centred_PG / (rewards_PG.std(1, keepdim=True) + STD_FLOOR)
    return centred_PG.masked_fill(flat_groups(rewards_PG)[:, None], 0.0).flatten()


def leave_one_out(rewards_B: Tensor, group: int) -> Tensor:
    """Rewards less the mean of the others of their group (RLOO, arXiv:2402.14740)."""
    rewards_PG = rewards_B.view(-1, group)
    others_PG = (rewards_PG.sum(1, keepdim=True) - rewards_PG) / max(group - 1, 1)
    return (rewards_PG - others_PG).masked_fill(flat_groups(rewards_PG)[:, None], 0.0).flatten()


def flat_groups(rewards_PG: Tensor) -> Tensor:
    """Groups with one reward for all: nothing can be learnt from them."""
    return (rewards_PG == rewards_PG[:, :1]).all(1)


def generalised(
    rewards_BT: Tensor, values_BT: Tensor, is_target_BT: Tensor, gamma: float, lambda_: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each token (GAE, arXiv:1506.02438); 0 where there is no target.

    The targets of a row follow each other; after the last nothing more is to be had.
    """
    advantages_BT = torch.zeros_like(rewards_BT)
    next_value_B, next_advantage_B = torch.zeros_like(rewards_BT[:, 0]), torch.zeros_like(rewards_BT[:, 0])
    for t in reversed(range(rewards_BT.shape[1])):
        counts_B = is_target_BT[:, t]
        error_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        found_B = error_B + gamma * lambda_ * next_advantage_B
        advantages_BT[:, t] = torch.where(counts_B, found_B, 0.0)
        next_value_B = torch.where(counts_B, values_BT[:, t], 0.0)
        next_advantage_B = advantages_BT[:, t]
    return advantages_BT, (advantages_BT + values_BT) * is_target_BT
