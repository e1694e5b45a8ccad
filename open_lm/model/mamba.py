"""Mamba, a language model with a state in the place of attention (arXiv:2312.00752); weights are named as by mamba-ssm.

Shapes: B batch, T positions, D model width, I channels of a block, N numbers of state per channel, W width of the
convolution, R rank of the step, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.model.architecture import MambaConfig
from open_lm.model.norms import RMSNorm
from open_lm.model.selective_scan import selective_scan

STEP_MIN, STEP_MAX, STEP_FLOOR = 1e-3, 1e-1, 1e-4
"""Range of the first steps of the channels."""


class MambaState:
    """One block's memory: the last inputs of its convolution, (B, W - 1, I), and its channels' state, (B, I, N),
    None before the first."""

    def __init__(self, config: MambaConfig, batch: int, device: torch.device, dtype: torch.dtype):
        self.inputs = torch.zeros(batch, config.d_conv - 1, config.inner_dim, device=device, dtype=dtype)
        self.state: Tensor | None = None

    def reorder(self, rows: Tensor) -> None:
        """Let row i continue what row `rows[i]` has seen."""
        self.inputs, self.state = self.inputs[rows], None if self.state is None else self.state[rows]


class MambaCache:
    """The decoding state of a Mamba model, of the same size for any number of positions: one MambaState per block."""

    def __init__(self, config: MambaConfig, batch: int, device: torch.device, dtype: torch.dtype):
        self.layers = [MambaState(config, batch, device, dtype) for _ in range(config.n_layer)]
        self.length = 0

    def reorder(self, rows: Tensor) -> None:
        """Let row i of the batch continue what row `rows[i]` has seen."""
        for layer in self.layers:
            layer.reorder(rows)


class Mixer(nn.Module):
    """Gated: a short causal convolution, then the selective state space over each channel."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.config = config
        inner, rank = config.inner_dim, config.step_rank
        self.in_proj = nn.Linear(config.d_model, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, config.d_conv, groups=inner)
        self.x_proj = nn.Linear(inner, rank + 2 * config.d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, config.d_state))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, config.d_model, bias=False)

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        """The rows of each matrix that a parameter packs, for optimizers that work on matrices."""
        config = self.config
        return {
            "in_proj.weight": (config.inner_dim, config.inner_dim),
            "x_proj.weight": (config.step_rank, config.d_state, config.d_state),
        }

    def reset_parameters(self) -> None:
        """Projections, convolution: as torch does, out_proj over sqrt(blocks); a -1 to -N; log-uniform steps."""
        for part in (self.in_proj, self.conv1d, self.x_proj, self.out_proj):
            part.reset_parameters()
        rank = self.config.step_rank
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(self.config.n_layer)
            nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
            low, high = math.log(STEP_MIN), math.log(STEP_MAX)
            steps_I = torch.empty_like(self.dt_proj.bias).uniform_(low, high).exp().clamp(min=STEP_FLOOR)
            self.dt_proj.bias.copy_(steps_I + torch.log(-torch.expm1(-steps_I)))  # softplus of it gives the step
            numbers_N = torch.arange(1, self.config.d_state + 1, dtype=torch.float32, device=self.A_log.device)
            self.A_log.copy_(numbers_N.log().expand_as(self.A_log))
            self.D.fill_(1.0)

    def forward(self, x_BTD: Tensor, real_BT: Tensor | None = None, memory: MambaState | None = None) -> Tensor:
        x_BTI, gate_BTI = self.in_proj(x_BTD).chunk(2, dim=-1)
        if real_BT is not None:  # padding adds nothing to the convolution, nor to the state
            x_BTI = x_BTI * real_BT[..., None]
        x_BTI = F.silu(self.convolved(x_BTI, memory))
        if real_BT is not None:
            x_BTI = x_BTI * real_BT[..., None]
        mixed_BTI = self.scanned(x_BTI, memory)
        return self.out_proj(mixed_BTI.type_as(gate_BTI) * F.silu(gate_BTI))

    def convolved(self, x_BTI: Tensor, memory: MambaState | None) -> Tensor:
        """Each channel's convolution with its last W inputs; before the first there are zeros, or what memory holds."""
        width = self.config.d_conv - 1
        before = x_BTI.new_zeros(len(x_BTI), width, x_BTI.shape[2]) if memory is None else memory.inputs.type_as(x_BTI)
        inputs = torch.cat((before, x_BTI), dim=1)
        if memory is not None:
            memory.inputs = inputs[:, inputs.shape[1] - width :].detach()
        return self.conv1d(inputs.mT).mT

    def scanned(self, x_BTI: Tensor, memory: MambaState | None) -> Tensor:
        """The state space, in fp32."""
        rank, n_state = self.config.step_rank, self.config.d_state
        step_BTR, b_BTN, c_BTN = self.x_proj(x_BTI).split((rank, n_state, n_state), dim=-1)
        with torch.autocast(x_BTI.device.type, enabled=False):
            step_BTI = F.softplus(F.linear(step_BTR.float(), self.dt_proj.weight.float(), self.dt_proj.bias.float()))
            x32_BTI, a_IN = x_BTI.float(), -self.A_log.float().exp()
            start = None if memory is None else memory.state
            y_BTI, end = selective_scan(x32_BTI, step_BTI, a_IN, b_BTN.float(), c_BTN.float(), start)
            if memory is not None:
                memory.state = end.detach()
            return y_BTI + self.D.float() * x32_BTI


class MambaBlock(nn.Module):
    """`x + mixer(norm(x))`."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.mixer = Mixer(config)
        self.norm = RMSNorm(config.d_model, config.norm_eps)

    def forward(self, x_BTD: Tensor, real_BT: Tensor | None = None, memory: MambaState | None = None) -> Tensor:
        return x_BTD + self.mixer(self.norm(x_BTD), real_BT, memory)


class Backbone(nn.Module):
    """Everything but the output layer."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(MambaBlock(config) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)

    def forward(self, input_ids_BT: Tensor, real_BT: Tensor | None, cache: MambaCache | None) -> Tensor:
        x_BTD = self.embedding(input_ids_BT)
        for number, block in enumerate(self.layers):
            x_BTD = block(x_BTD, real_BT, cache.layers[number] if cache is not None else None)
        return self.norm_f(x_BTD)


class Mamba(nn.Module):
    """Token ids to logits of the next token, called like a Transformer."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.tie_weights()
        self.register_load_state_dict_post_hook(lambda model, _: model.tie_weights())

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, in order."""
        return self.backbone.layers

    def tie_weights(self) -> None:
        """Make embedding and output one parameter again, where the config says so, after either was replaced."""
        if self.config.tie_embeddings and self.lm_head.weight is not self.backbone.embedding.weight:
            self.lm_head.weight = self.backbone.embedding.weight

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # `to`, `to_empty` and their like replace parameters
        super()._apply(fn, recurse)
        self.tie_weights()
        return self

    def reset_parameters(self) -> None:
        """Embedding 0.02; an untied output as torch begins it."""
        self.lm_head.reset_parameters()
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)

    def new_cache(self, batch: int, max_len: int) -> MambaCache:
        """An empty cache for decoding `batch` rows; its size does not depend on `max_len`."""
        weight = self.lm_head.weight
        return MambaCache(self.config, batch, weight.device, weight.dtype)

    def forward(
        self,
        input_ids_BT: Tensor,
        past_key_values: MambaCache | None = None,
        use_cache: bool = False,
        attention_mask_BT: Tensor | None = None,
        *,
        head: Callable[..., Any] | None = None,
    ) -> Any:
        """`(logits_BTV in fp32, hidden_BTD, past_key_values)`, or `head(hidden_BTD, output_VD)` when a head is given.

        `attention_mask_BT` is 0 on positions that are padding; those before the given ids may be in front of it.
        """
        cache = past_key_values
        if use_cache and cache is None:
            cache = self.new_cache(len(input_ids_BT), 0)
        real_BT = None if attention_mask_BT is None else attention_mask_BT[:, -input_ids_BT.shape[1] :]
        hidden_BTD = self.backbone(input_ids_BT, real_BT, cache)
        if cache is not None:
            cache.length += input_ids_BT.shape[1]
        if head is not None:
            return head(hidden_BTD, self.lm_head.weight)
        return self.lm_head(hidden_BTD).float(), hidden_BTD, cache if use_cache else None
