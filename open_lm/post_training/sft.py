"""Supervised fine-tuning: next-token loss over the answers, with noise on the embeddings where asked for (NEFTune).

Shapes: B sequences, T positions, D model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from open_lm.data.batch import Batch
from open_lm.data.permutations import key
from open_lm.errors import ConfigError
from open_lm.post_training.tasks import TaskKind, TaskParts
from open_lm.train.tasks import Losses, Task


@dataclass(frozen=True)
class FineTuning(Task):
    """The loss of pretraining over the targets that the data leave, and how much of the batches they are."""

    next_token: Task
    noise: EmbeddingNoise | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.next_token.names, "real_token_share", "target_share")

    def prepare(self, state: Any, batch: Batch, accum: int) -> Batch:
        """The batch with the number of each row in the global one, which its noise follows from."""
        if self.noise is None:
            return batch
        self.noise.step = state.step
        rows_B = torch.arange(len(batch), device=batch.device) + state.world.data_rank * len(batch)
        return replace(batch, extras={**batch.extras, "row": rows_B})

    def loss_sums(self, model: nn.Module, batch: Batch) -> Losses:
        if self.noise is not None:
            self.noise.rows = batch.extras.get("row")
        losses = self.next_token.loss_sums(model, batch)
        n_targets, n_positions = batch.n_targets, batch.targets_BT.numel()
        real = batch.extras["real_share"].mean() if "real_share" in batch.extras else n_targets.new_ones(())
        shares = torch.stack([real * n_targets, n_targets * n_targets / n_positions])  # sums of means over targets
        return Losses(losses.total, torch.cat((losses.parts, shares.to(losses.parts.dtype))))


@dataclass
class EmbeddingNoise:
    """Uniform noise on the embeddings of a model in training mode (Jain et al., arXiv:2310.05914).

    The noise of a row is a function of seed, step and the row's number in the global batch: neither ranks nor
    accumulation nor a restart change it.
    """

    alpha: float
    seed: int
    step: int = 0
    rows: Tensor | None = field(default=None, repr=False)

    def hook(self, module: nn.Module, _: Any, embedded_BTD: Tensor) -> Tensor:
        """A forward hook of the embedding layer."""
        if not module.training or self.rows is None:
            return embedded_BTD
        bound = self.alpha / math.sqrt(embedded_BTD.shape[1] * embedded_BTD.shape[2])
        noise_BTD = torch.stack([self._of_row(row, embedded_BTD) for row in self.rows.tolist()])
        return embedded_BTD + bound * noise_BTD

    def _of_row(self, row: int, like_BTD: Tensor) -> Tensor:
        generator = torch.Generator(like_BTD.device)
        generator.manual_seed(int(key("neftune", self.seed, self.step, row)) >> 1)
        drawn_TD = torch.rand(like_BTD.shape[1:], generator=generator, device=like_BTD.device)
        return (2 * drawn_TD - 1).to(like_BTD.dtype)


def embedding_of(model: nn.Module) -> nn.Module:
    """The layer that turns ids into vectors.

    Raises:
        ConfigError: the model has none of its own.
    """
    plain: Any = getattr(model, "module", model)
    plain = getattr(plain, "model", plain)
    if hasattr(plain, "get_input_embeddings"):
        return plain.get_input_embeddings()
    found = [module for module in plain.modules() if isinstance(module, nn.Embedding)]
    if len(found) != 1:
        raise ConfigError(f"--neftune-alpha: the model has {len(found)} embedding layers; it needs one.")
    return found[0]


def build(parts: TaskParts) -> FineTuning:
    """The objective of --task sft."""
    alpha = parts.flags.task.neftune_alpha
    if not alpha:
        return FineTuning(parts.next_token)
    noise = EmbeddingNoise(alpha, parts.flags.train.seed)
    embedding_of(parts.model).register_forward_hook(noise.hook)
    return FineTuning(parts.next_token, noise)


SFT = TaskKind(build)
