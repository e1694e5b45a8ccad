"""Mixture of experts: each token goes through the few feed-forward layers that a router picks for it.

Shapes: N tokens, D model width, F hidden width of an expert, E experts, K experts of one token, C tokens an expert
takes, A = N K assignments of a token to an expert.
(Switch Transformer, arXiv:2101.03961; dropless as in MegaBlocks, arXiv:2211.15841.)
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.model.config import ModelConfig
from open_lm.model.feed_forward import default_width
from open_lm.model.grouped_mm import Loads, build_grouped_product
from open_lm.model.init import scaled_normal_
from open_lm.model.split import HiddenWidth, TensorPlan, Tokens


class Routing(NamedTuple):
    """Statistics of the routers in a forward pass: of one layer, or of all layers that have experts."""

    balance_loss: Tensor
    """1 when all experts get the same share, more when not; a mean over layers, with gradients."""
    n_dropped: Tensor
    """Assignments that found their expert full; a sum over layers."""
    load: Tensor
    """The share of all assignments that each expert was chosen for: (E,), or (layers, E)."""


def over_layers(routings: list[Routing]) -> Routing:
    """The routing of a whole model."""
    losses, dropped, loads = zip(*routings, strict=True)
    return Routing(torch.stack(losses).mean(), torch.stack(dropped).sum(), torch.stack(loads))


def expert_width(config: ModelConfig) -> int:
    """Hidden width of an expert."""
    as_megablocks = config.moe_expert_type == "megablocks"
    return config.ffn_dim or default_width("gelu" if as_megablocks else config.ffn_type, config.hidden_dim)


class Experts(nn.Module):
    """The feed-forward layers of all experts, as two stacks of matrices without biases.

    `moe_expert_type` ffn: as `ffn_type` says; megablocks: as MegaBlocks has them unless told otherwise, and so all of
    OpenLM's models with experts: tanh gelu, not gated, four times as wide as the model.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.dim, self.layer, self.n_experts = config.hidden_dim, layer, config.moe_num_experts or 1
        as_megablocks = config.moe_expert_type == "megablocks"
        self.gated = config.ffn_type != "gelu" and not as_megablocks
        self.activation: Any = F.silu if config.ffn_type.startswith("swiglu") else F.gelu
        if as_megablocks:
            self.activation = partial(F.gelu, approximate="tanh")
        self.product = build_grouped_product(config)
        self.width = expert_width(config)
        self.w12 = nn.Parameter(torch.empty(self.n_experts, self.width * (2 if self.gated else 1), self.dim))
        self.w3 = nn.Parameter(torch.empty(self.n_experts, self.dim, self.width))

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        """The rows of each matrix of an expert that a parameter packs, for optimizers that work on matrices."""
        return {"w12": (self.width,) * (2 if self.gated else 1), "w3": (self.dim,)}

    def reset_parameters(self) -> None:
        """As in the feed-forward layers: w12 1/sqrt(D); w3 1/sqrt(F) / sqrt(2 (layer + 1))."""
        scaled_normal_(self.w12, self.dim**-0.5)
        scaled_normal_(self.w3, self.width**-0.5 / math.sqrt(2 * (self.layer + 1)))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """`w12` and `w3` as the products take them."""
        return self.w12, self.w3

    def of_equal_loads(self, x_ECD: Tensor) -> Tensor:
        """Each expert applied to its C rows, as batched products."""
        w12, w3 = self.matrices()
        return torch.bmm(self._activated(torch.bmm(x_ECD, w12.mT)), w3.mT)

    def of_any_loads(self, x_AD: Tensor, counts_E: Tensor) -> Tensor:
        """Each expert applied to its rows of `x_AD`, which hold those of expert 0 first, `counts_E` of each."""
        loads, (w12, w3) = Loads(counts_E), self.matrices()
        hidden_AF = self._activated(self.product(x_AD, w12, loads))
        return self.product(hidden_AF, w3, loads)

    def _activated(self, hidden: Tensor) -> Tensor:
        if not self.gated:
            return self.activation(hidden)
        gate, value = hidden.chunk(2, dim=-1)
        return self.activation(gate) * value


class MixtureOfExperts(nn.Module):
    """Token-choice routing: every token takes its `moe_top_k` likeliest experts, weighted by their probabilities.

    In training an expert takes `moe_capacity_factor` times its even share and drops what comes later (0: it takes all);
    in eval mode nothing is dropped, so that a token's result does not depend on what else is in the batch.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.dim, self.n_experts, self.top_k = config.hidden_dim, config.moe_num_experts or 1, config.moe_top_k
        self.capacity_factor = config.moe_capacity_factor
        self.router = nn.Linear(self.dim, self.n_experts, bias=False)
        self.experts = Experts(config, layer)

    def tensor_plan(self) -> TensorPlan:
        """A part of every expert's hidden width for each rank; all ranks route alike."""
        return {"router": Tokens(), "experts": HiddenWidth()}

    def reset_parameters(self) -> None:
        """router: 1/sqrt(D)."""
        scaled_normal_(self.router.weight, self.dim**-0.5)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        x_ND = x_BTD.flatten(0, -2)
        probs_NE = self.router(x_ND).float().softmax(-1)
        weights_NK, experts_NK = probs_NE.topk(self.top_k, dim=-1)
        # First choices of all tokens come before second ones, so that those are the last to be dropped.
        experts_A, weights_A = experts_NK.t().flatten(), weights_NK.t().flatten()
        counts_E = F.one_hot(experts_A, self.n_experts).sum(0)
        tokens_A = torch.arange(len(x_ND), device=x_ND.device).repeat(self.top_k)
        order_A = experts_A.argsort(stable=True)
        tokens_A, weights_A = tokens_A[order_A], weights_A[order_A]
        if self.training and self.capacity_factor > 0:
            mixed_AD, n_dropped = self._limited(x_ND[tokens_A], experts_A[order_A], counts_E)
        else:
            mixed_AD = self.experts.of_any_loads(x_ND[tokens_A], counts_E)
            n_dropped = counts_E.new_zeros(())
        out_ND = torch.zeros_like(x_ND, dtype=mixed_AD.dtype)
        out_ND = out_ND.index_add(0, tokens_A, mixed_AD * weights_A[:, None].to(mixed_AD.dtype))
        load_E = counts_E / len(tokens_A)
        balance_loss = self.n_experts * (load_E * probs_NE.mean(0)).sum()
        return out_ND.view_as(x_BTD), Routing(balance_loss, n_dropped, load_E)

    def _limited(self, x_AD: Tensor, experts_A: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of the experts for the first `capacity` rows of each; zeros for the rest, which is counted."""
        capacity = math.ceil(self.capacity_factor * len(x_AD) / self.n_experts)
        starts_E = counts_E.cumsum(0) - counts_E
        rank_A = torch.arange(len(x_AD), device=x_AD.device) - starts_E[experts_A]
        fits_A = rank_A < capacity
        slot_A = experts_A * capacity + rank_A.clamp(max=capacity - 1)
        x_AD = x_AD * fits_A[:, None]
        slots_SD = x_AD.new_zeros(self.n_experts * capacity, self.dim).index_add(0, slot_A, x_AD)
        mixed_SD = self.experts.of_equal_loads(slots_SD.view(self.n_experts, capacity, self.dim)).flatten(0, 1)
        return mixed_SD[slot_A] * fits_A[:, None], (~fits_A).sum()
