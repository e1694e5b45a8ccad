"""Weights that a rank of a mesh computes with, counted on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from open_lm.mesh import MeshShape
from open_lm.model.architecture import ModelConfig
from open_lm.model.moe import Experts


@dataclass(frozen=True)
class LocalWeights:
    """Numbers of parameters that one rank computes with, gathered from the ranks that shard them."""

    tables: float
    """Token embedding and output layer."""
    inner: float
    """The blocks without their experts."""
    experts: float
    n_layers: int
    shape: MeshShape

    @classmethod
    def of(cls, model: nn.Module, config: ModelConfig, shape: MeshShape) -> LocalWeights:
        """Counts of `model`, which may be on the meta device."""
        experts = sum(p.numel() for m in model.modules() if isinstance(m, Experts) for p in m.parameters())
        tables = (1 if config.weight_tying else 2) * config.vocab_size * config.hidden_dim
        inner = sum(p.numel() for p in model.parameters()) - experts - tables
        tp = shape.tp
        return cls(tables / tp, inner / tp, experts / tp / shape.ep, config.n_layers, shape)

    @property
    def dense(self) -> float:
        """Parameters without experts."""
        return self.tables + self.inner

    @property
    def blocks(self) -> float:
        """Parameters of all blocks."""
        return self.inner + self.experts

    @property
    def whole(self) -> float:
        """Parameters that the rank computes with."""
        return self.tables + self.blocks

    @property
    def block(self) -> float:
        """Parameters of a block, in the mean."""
        return self.blocks / self.n_layers

    @property
    def share(self) -> float:
        """Parameters that the rank stores: FSDP spreads experts over the ranks that have the same ones."""
        return self.dense / self.shape.n_shards + self.experts / (self.shape.fsdp * self.shape.cp)
