"""Policy-gradient objectives over stored answers: GRPO, RLOO and PPO.  Shapes: B answers, T positions, D model width.

A batch carries, in its extras, what was known when its answers were sampled: `old` log-probabilities (B, T) of their
tokens, `advantage` (B, T), `reward` (B,), `finished` (B,), and where they are used `reference` log-probabilities,
`value` and `return` (B, T each). The ratio of new to old probabilities is 1 in the first minibatch and not after it:
old ones are never computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from open_lm.data.batch import IGNORED, Batch
from open_lm.errors import ConfigError
from open_lm.post_training.config import RLConfig
from open_lm.post_training.log_probs import log_prob_head
from open_lm.post_training.tasks import TaskKind, TaskParts
from open_lm.train.tasks import Losses, Task


@dataclass(frozen=True)
class PolicyGradient(Task):
    """The clipped surrogate -min(ratio A, clip(ratio) A) (PPO, arXiv:1707.06347), with a value head's loss in PPO.

    RLOO takes the ratio of whole answers, the others that of each token.
    """

    kind: str
    config: RLConfig

    @property
    def names(self) -> tuple[str, ...]:
        names = (
            "loss", "reward", "answer_tokens", "finished_share", "clip_share", "ratio_deviation",
            "kl", "log_prob",
        )  # fmt: skip
        return (*names, "value_loss") if self.kind == "ppo" else names

    @property
    def by_sequence(self) -> bool:
        """Whether the loss is a mean over answers."""
        return self.kind == "rloo" or self.config.rl_loss_mean == "sequences"

    def count(self, batch: Batch) -> Tensor:
        """Tokens or answers of the loss, then answers for what is reported of them, tokens for the rest."""
        tokens, answers = batch.n_targets, has_targets(batch).sum()
        loss = answers if self.by_sequence else tokens
        per_token = [tokens] * (len(self.names) - 4)
        return torch.stack([loss, answers, answers, answers, *per_token])

    def loss_sums(self, model: nn.Module, batch: Batch) -> Losses:
        new_BT, value_BT = self._compute(model, batch)
        is_target_BT = batch.targets_BT != IGNORED
        extras = {name: extra.to(new_BT.dtype) for name, extra in batch.extras.items()}
        difference_BT = (new_BT - extras["old"]) * is_target_BT
        surrogate_BT, clipped_BT, ratio_BT = self._surrogate(difference_BT, extras["advantage"], is_target_BT)
        kl_BT = self._divergence(new_BT, extras, is_target_BT)
        loss_BT = surrogate_BT
        if self.config.kl_in == "loss" and self.config.kl_coefficient:
            loss_BT = loss_BT + self.config.kl_coefficient * kl_BT
        value_loss_BT = torch.zeros_like(loss_BT) if value_BT is None else self._value_loss(value_BT, extras)
        loss_BT = (loss_BT + self.config.value_coefficient * value_loss_BT) * is_target_BT
        length_B1 = is_target_BT.sum(1, keepdim=True).clamp(min=1)
        total = (loss_BT / length_B1 if self.by_sequence else loss_BT).sum()
        answered_B = has_targets(batch)
        rows = [
            total, (extras["reward"] * answered_B).sum(), is_target_BT.sum(), (extras["finished"] * answered_B).sum(),
            clipped_BT.sum(), ((ratio_BT - 1).abs() * is_target_BT).sum(), kl_BT.sum(), new_BT.sum(),
        ]  # fmt: skip
        rows += [(value_loss_BT * is_target_BT).sum()] if self.kind == "ppo" else []
        return Losses(total, torch.stack([row.detach().to(total.dtype) for row in rows]))

    def _compute(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The log-probability of each target, and with PPO what the value head says before it."""
        inner: Any = getattr(model, "module", model)
        of_targets = log_prob_head(batch, self.config.rollout_temperature)

        def head(hidden_BTD: Tensor, weight_VD: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
            log_p_BT = of_targets(hidden_BTD, weight_VD)
            return log_p_BT, inner.value_head(hidden_BTD)[..., 0].float() if self.kind == "ppo" else None

        return model(batch.inputs_BT, **batch.model_inputs, head=head)

    def _surrogate(
        self, difference_BT: Tensor, advantage_BT: Tensor, is_target_BT: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of each token, whether its ratio is clipped, and the ratio."""
        if self.kind == "rloo":  # the ratio of a whole answer: its loss is spread evenly over the tokens
            difference_BT = difference_BT.sum(1, keepdim=True).expand_as(difference_BT)
        ratio_BT = difference_BT.exp()
        bounded_BT = ratio_BT.clamp(1 - self.config.clip_low, 1 + self.config.clip_high)
        plain_BT, limited_BT = ratio_BT * advantage_BT, bounded_BT * advantage_BT
        return -torch.minimum(plain_BT, limited_BT) * is_target_BT, (limited_BT < plain_BT) & is_target_BT, ratio_BT

    def _divergence(self, new_BT: Tensor, extras: dict[str, Tensor], is_target_BT: Tensor) -> Tensor:
        """exp(d) - d - 1 with d = log ref - log pi: never negative, and right on average (Schulman, 2020)."""
        if "reference" not in extras:
            return torch.zeros_like(new_BT)
        difference_BT = (extras["reference"] - new_BT) * is_target_BT
        return difference_BT.exp() - difference_BT - 1

    def _value_loss(self, value_BT: Tensor, extras: dict[str, Tensor]) -> Tensor:
        limit = self.config.value_clip
        near_BT = extras["value"] + (value_BT - extras["value"]).clamp(-limit, limit)
        errors = [(v - extras["return"]).square() for v in (value_BT, near_BT)]
        return 0.5 * torch.maximum(*errors)


def has_targets(batch: Batch) -> Tensor:
    """Rows that have anything to predict, (B,)."""
    return (batch.targets_BT != IGNORED).any(-1)


def build(parts: TaskParts) -> PolicyGradient:
    """The objective of grpo, rloo or ppo.

    Raises:
        ConfigError: prompts or rewards are not given, or a group is too small.
    """
    name, config = parts.flags.task.task, parts.flags.rl
    if not config.prompts:
        raise ConfigError(f"--task {name} answers prompts: give --prompts and --reward.")
    if name == "rloo" and config.group_size < 2:
        raise ConfigError("--task rloo compares the answers to one prompt: --group-size must be 2 or more.")
    return PolicyGradient(name, config)


GRPO = RLOO = TaskKind(build, form="prompts")
PPO = TaskKind(build, form="prompts", value_head="beside")
