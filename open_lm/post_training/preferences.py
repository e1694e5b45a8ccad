"""Preference training: chosen answers over rejected ones, by any of the losses in preference_losses.py.

Shapes: B sequences (chosen and rejected in turns), T positions, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from open_lm.data.batch import IGNORED, Batch
from open_lm.errors import ConfigError
from open_lm.post_training.config import PREFERENCE_LOSSES, WITHOUT_REFERENCE, PreferenceConfig
from open_lm.post_training.log_probs import sums_and_lengths, token_log_probs
from open_lm.post_training.preference_losses import Pairs, Side, kto
from open_lm.post_training.reference import COLUMN, Reference, build_reference
from open_lm.post_training.tasks import TaskKind, TaskParts
from open_lm.train.tasks import Losses, Task

KL = "kl"
"""Name of kto's divergence in `Batch.extras`, the same for every row."""


@dataclass(frozen=True)
class Preferences(Task):
    """The mean loss over pairs; `loss` is a name of PREFERENCE_LOSSES."""

    loss: str
    config: PreferenceConfig
    reference: Reference | None

    @property
    def names(self) -> tuple[str, ...]:
        return (
            "loss", "preference_accuracy", "reward_margin", "reward_chosen", "reward_rejected",
            "log_prob_chosen", "log_prob_rejected",
        )  # fmt: skip

    def count(self, batch: Batch) -> Tensor:
        """Pairs."""
        return complete_pairs(batch).sum()

    def loss_sums(self, model: nn.Module, batch: Batch) -> Losses:
        pairs = self._pairs(model, batch)
        losses_P = PREFERENCE_LOSSES.load(self.loss)(pairs, self.config) * pairs.weight
        return Losses(losses_P.sum(), self._parts(pairs, losses_P))

    def _pairs(self, model: nn.Module, batch: Batch) -> Pairs:
        policy_B, length_B = sums_and_lengths(token_log_probs(model, batch), batch)
        reference_B = self._reference(model, batch, policy_B)
        sides = [
            Side(policy_B[k::2], reference_B[k::2].to(policy_B.dtype), length_B[k::2].clamp(min=1)) for k in (0, 1)
        ]
        return Pairs(sides[0], sides[1], complete_pairs(batch).to(policy_B.dtype))

    def _reference(self, model: nn.Module, batch: Batch, policy_B: Tensor) -> Tensor:
        if COLUMN in batch.extras:
            return batch.extras[COLUMN]
        if self.reference is None:
            return torch.zeros_like(policy_B)
        return self.reference(model, batch, 1.0).sum(-1)

    @torch.no_grad()
    def _parts(self, pairs: Pairs, losses_P: Tensor) -> Tensor:
        """Sums of what is reported; rewards are beta times what the loss compares."""
        loss = PREFERENCE_LOSSES.load(self.loss) if self.loss in PREFERENCE_LOSSES else None  # kto has no pairs
        per_token, beta = getattr(loss, "per_token", False), self.config.beta_or(getattr(loss, "default_beta", 0.1))
        chosen, rejected = (
            beta * (s.mean_log_ratio if per_token else s.log_ratio) for s in (pairs.chosen, pairs.rejected)
        )
        rows = (
            losses_P, (chosen > rejected).to(losses_P.dtype), chosen - rejected, chosen, rejected,
            pairs.chosen.policy, pairs.rejected.policy,
        )  # fmt: skip
        return torch.stack([(row * pairs.weight).sum() for row in rows])


@dataclass(frozen=True)
class KahnemanTversky(Preferences):
    """kto: each side of a pair counts by itself, against the divergence that answers to other prompts show."""

    def count(self, batch: Batch) -> Tensor:
        """Sequences."""
        return 2 * super().count(batch)

    @torch.no_grad()
    def prepare(self, state: Any, batch: Batch, accum: int) -> Batch:
        """The batch with the divergence from the reference: the mean log-ratio, over the batches of all ranks, of each
        prompt with the answer of the next pair; at least 0."""
        if len(batch) < 4:
            raise ConfigError("--task kto measures a divergence over at least 2 pairs a rank: raise the batch.")
        total = torch.zeros(2, dtype=torch.float64, device=batch.device)
        for part in mismatched(batch).split(accum):
            with state.precision.autocast():
                policy_B, length_B = sums_and_lengths(token_log_probs(state.model, part), part)
                reference_B = self.reference(state.model, part, 1.0).sum(-1) if self.reference else 0 * policy_B
            total += torch.stack([(policy_B - reference_B).double().sum(), (length_B > 0).double().sum()])
        log_ratio, n_sequences = state.world.sum(total)
        kl = (log_ratio / n_sequences.clamp(min=1)).clamp(min=0)
        return replace(batch, extras={**batch.extras, KL: kl.float().expand(len(batch))})

    def loss_sums(self, model: nn.Module, batch: Batch) -> Losses:
        pairs = self._pairs(model, batch)
        kl = batch.extras[KL][0]
        ratios_PS = torch.stack([pairs.chosen.log_ratio, pairs.rejected.log_ratio], dim=1)
        is_chosen = torch.tensor([True, False], device=ratios_PS.device)
        losses_PS = kto(ratios_PS, is_chosen, kl, self.config) * pairs.weight[:, None]
        parts = self._parts(pairs, losses_PS.sum(1) / 2) * 2
        return Losses(losses_PS.sum(), torch.cat([parts, kl.to(parts.dtype)[None] * 2 * pairs.weight.sum()]))

    @property
    def names(self) -> tuple[str, ...]:
        return (*super().names, "kl")


def complete_pairs(batch: Batch) -> Tensor:
    """Whether both sides of each pair have something to predict, (P,)."""
    return (batch.targets_BT != IGNORED).any(-1).view(-1, 2).all(-1)


def mismatched(batch: Batch) -> Batch:
    """Each row's prompt followed by the answer of the same side of the next pair, cut to the width of the batch."""
    width, n_rows = batch.inputs_BT.shape[1], len(batch)
    ids = torch.full((n_rows, width + 1), 0, device=batch.device)
    targets = torch.full((n_rows, width), IGNORED, device=batch.device)
    is_target = batch.targets_BT != IGNORED
    begin = torch.where(is_target.any(1), is_target.int().argmax(1), 0).tolist()
    end = (width - is_target.flip(1).int().argmax(1)).tolist()
    for row in range(n_rows):
        other = (row + 2) % n_rows
        prompt = batch.inputs_BT[row, : begin[row] + 1]
        answer = batch.targets_BT[other, begin[other] : end[other]]
        answer = answer[: width + 1 - len(prompt)].clamp(min=0)
        ids[row, : len(prompt)] = prompt
        ids[row, len(prompt) : len(prompt) + len(answer)] = answer
        if is_target[row].any() and is_target[other].any():
            targets[row, len(prompt) - 1 : len(prompt) - 1 + len(answer)] = answer
    return Batch(ids[:, :-1], targets, group=batch.group)


def build(parts: TaskParts) -> Preferences:
    """The objective of a preference task.

    Raises:
        ConfigError: none is named for a loss that needs a reference, or a file of it for kto.
    """
    name, config = parts.flags.task.task, parts.flags.preferences
    if name in WITHOUT_REFERENCE:
        return Preferences(name, config, None)
    cached = config.reference_log_probs is not None
    if name == "kto":
        if cached:
            raise ConfigError("--task kto asks the reference about new pairs: give --reference, not a file.")
        return KahnemanTversky(name, config, build_reference(parts))
    return Preferences(name, config, None if cached else build_reference(parts))


PREFERENCES = TaskKind(build, form="pairs", rows=2)
