"""Reward models: a value head on any model, trained on pairs, and the scores it gives.

Shapes: B sequences, T positions, P pairs, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.data.batch import IGNORED, Batch
from open_lm.errors import CheckpointError, ConfigError
from open_lm.model.lora import VALUE_HEAD
from open_lm.post_training.config import PreferenceConfig
from open_lm.post_training.preferences import complete_pairs
from open_lm.post_training.tasks import TaskKind, TaskParts
from open_lm.train.tasks import Losses, Task

MARGIN = "margin"
"""Name of the margins of pairs in `Batch.extras`, where the data have them."""


def add_value_head(model: nn.Module, *, alone: bool = False) -> None:
    """Give `model` a linear layer from its last hidden state to one number, 0 at the start.

    `alone`: its output layer is not used beside it, and frozen where it is not the embedding too.

    Raises:
        ConfigError: `alone`, and the model's table of positions ends with its context.
    """
    if alone:
        _require_position_behind(model)
    like: Any = next(model.parameters())
    output = output_of(model)
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    if alone and not any(output is weight for weight in embeddings):
        output.requires_grad_(False)
    head = nn.Linear(output.shape[1], 1, bias=False, device=like.device, dtype=like.dtype)
    nn.init.zeros_(head.weight)
    model.add_module("value_head", head)


def _require_position_behind(model: nn.Module) -> None:
    """Rewards are read at the last of seq_len + 1 tokens, for which a learned position must be there too."""
    if not hasattr(model, "model"):
        return
    theirs: Any = model.model
    longest = getattr(theirs.config, "max_position_embeddings", None)
    tables = [m for m in theirs.modules() if isinstance(m, nn.Embedding) and m is not theirs.get_input_embeddings()]
    seq_len: int = model.config.seq_len  # type: ignore[union-attr,assignment]
    if longest is not None and tables and seq_len >= longest:
        raise ConfigError(
            f"--hf-seq-len {seq_len}: a reward is read at the token behind the context, and the model's table of "
            f"positions ends with it. Give --hf-seq-len {longest - 1}, and data made with --seqlen {longest - 1}."
        )


def output_of(model: nn.Module) -> nn.Parameter:
    """The output matrix of a model of ours or of transformers."""
    inner: Any = model
    if hasattr(inner, "model") and hasattr(inner.model, "get_output_embeddings"):
        return inner.model.get_output_embeddings().weight
    return (inner.output if hasattr(inner, "output") else inner.lm_head).weight


def values_of(model: nn.Module, batch: Batch) -> Tensor:
    """The values that the value head of `model` gives each position, (B, T) in fp32."""
    inner: Any = getattr(model, "module", model)

    def head(hidden_BTD: Tensor, weight_VD: Tensor, **_: Any) -> Tensor:
        return inner.value_head(hidden_BTD)[..., 0].float()

    return model(batch.inputs_BT, **batch.model_inputs, head=head)


def rewards_of(model: nn.Module, batch: Batch) -> Tensor:
    """The reward of each sequence, (B,): the value at its last token, which the last target is.

    Padding behind it changes nothing: attention is causal.
    """
    tokens_BT = torch.cat([batch.inputs_BT, torch.zeros_like(batch.inputs_BT[:, :1])], dim=1)
    last_B = last_targets(batch) + 1
    ends_B1 = batch.targets_BT.gather(1, (last_B - 1)[:, None]).clamp(min=0)
    whole = Batch(tokens_BT.scatter(1, last_B[:, None], ends_B1), tokens_BT)
    return values_of(model, whole).gather(1, last_B[:, None])[:, 0]


@torch.inference_mode()
def rewards_of_sequences(model: nn.Module, sequences: Sequence[Sequence[int]], batch_tokens: int = 8192) -> list[float]:
    """The reward of each sequence of two ids or more; those of like length are computed together."""
    device = next(model.parameters()).device
    rewards = [0.0] * len(sequences)
    waiting = sorted(range(len(sequences)), key=lambda k: len(sequences[k]))
    while waiting:
        width = len(sequences[waiting[-1]])
        size = max(1, batch_tokens // width)
        waiting, rows = waiting[:-size], waiting[-size:]
        inputs_BT = torch.zeros(len(rows), width - 1, dtype=torch.long)
        targets_BT = torch.full_like(inputs_BT, IGNORED)
        for place, row in enumerate(rows):
            ids = torch.tensor(sequences[row])
            inputs_BT[place, : len(ids) - 1], targets_BT[place, : len(ids) - 1] = ids[:-1], ids[1:]
        found = rewards_of(model, Batch(inputs_BT, targets_BT).to(device))
        for row, reward in zip(rows, found.tolist(), strict=True):
            rewards[row] = reward
    return rewards


def last_targets(batch: Batch) -> Tensor:
    """The position of the last target of each row, (B,)."""
    is_target_BT = batch.targets_BT != IGNORED
    return is_target_BT.shape[1] - 1 - is_target_BT.flip(1).int().argmax(1)


@dataclass(frozen=True)
class RewardModelling(Task):
    """-log sigmoid(r(chosen) - r(rejected) - margin) (Bradley-Terry; margins as in Llama 2, arXiv:2307.09288), plus
    `centring` times (r(chosen) + r(rejected))^2 (arXiv:2312.09244)."""

    centring: float = 0.0

    names = ("loss", "preference_accuracy", "reward_margin", "reward_chosen", "reward_rejected")

    def count(self, batch: Batch) -> Tensor:
        """Pairs."""
        return complete_pairs(batch).sum()

    def loss_sums(self, model: nn.Module, batch: Batch) -> Losses:
        chosen_P, rejected_P = rewards_of(model, batch).view(-1, 2).unbind(1)
        margin_P = batch.extras[MARGIN][::2].to(chosen_P.dtype) if MARGIN in batch.extras else 0.0
        losses_P = -F.logsigmoid(chosen_P - rejected_P - margin_P)
        losses_P = losses_P + self.centring * (chosen_P + rejected_P).square()
        rows = (losses_P, (chosen_P > rejected_P).float(), chosen_P - rejected_P, chosen_P, rejected_P)
        parts = torch.stack([(row * complete_pairs(batch)).sum() for row in rows])
        return Losses(parts[0], parts.detach())


def load_reward_model(path: str, device: str, dtype: torch.dtype | None = None) -> nn.Module:
    """The reward model at `path`, in eval mode.

    Raises:
        CheckpointError: the checkpoint holds no value head.
    """
    from open_lm.checkpoint.load_model import load_model
    from open_lm.checkpoint.read import read_checkpoint
    from open_lm.weights.file import named_weights

    weights = named_weights(read_checkpoint(path))
    if VALUE_HEAD not in weights:
        raise CheckpointError(f"{path} holds no value head: train a reward model with --task reward.")
    model = load_model(path, device=device, dtype=dtype)
    add_value_head(model)
    model.get_parameter(VALUE_HEAD).data.copy_(weights[VALUE_HEAD])
    return model.eval().requires_grad_(False)


def build(parts: TaskParts) -> RewardModelling:
    """The objective of --task reward."""
    config: PreferenceConfig = parts.flags.preferences
    return RewardModelling(config.reward_centring)


REWARD = TaskKind(build, form="pairs", rows=2, value_head="alone")
