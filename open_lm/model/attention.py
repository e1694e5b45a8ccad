"""Causal self-attention.  Shapes: B batch, T queries, S keys, D model width, H heads, K head width."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.model.config import NORMS, POSITIONS, ModelConfig
from open_lm.model.init import scaled_normal_

KeyValue = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Multi-head (or grouped-query) attention; `in_proj` packs queries, keys and values in that order."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.dim, self.layer = config.hidden_dim, layer
        self.n_heads, self.kv_heads, self.head_dim = config.n_heads, config.kv_heads, config.head_dim
        q_width, kv_width = self.n_heads * self.head_dim, self.kv_heads * self.head_dim
        self.widths = [q_width, kv_width, kv_width]
        self.in_proj = nn.Linear(self.dim, sum(self.widths), bias=False)
        self.out_proj = nn.Linear(q_width, self.dim, bias=False)
        self.pos_embed = POSITIONS.load(config.positional_embedding_type)(self.head_dim)
        norm = NORMS.load(config.model_norm)
        self.q_norm = norm(q_width) if config.qk_norm else nn.Identity()
        self.k_norm = norm(kv_width) if config.qk_norm else nn.Identity()

    def reset_parameters(self) -> None:
        """in_proj: 1/sqrt(D); out_proj: 1/sqrt(D) / sqrt(2 (layer + 1))."""
        scaled_normal_(self.in_proj.weight, self.dim**-0.5)
        scaled_normal_(self.out_proj.weight, self.dim**-0.5 / math.sqrt(2 * (self.layer + 1)))

    def forward(
        self, x_BTD: Tensor, past: KeyValue | None = None, mask_BS: Tensor | None = None
    ) -> tuple[Tensor, KeyValue]:
        q, k, v = self.in_proj(x_BTD).split(self.widths, dim=-1)
        q_BTHK = self.q_norm(q).unflatten(-1, (self.n_heads, self.head_dim))
        k_BTHK = self.k_norm(k).unflatten(-1, (self.kv_heads, self.head_dim))
        v_BTHK = v.unflatten(-1, (self.kv_heads, self.head_dim))
        q_BTHK, k_BTHK = self.pos_embed(q_BTHK, k_BTHK, 0 if past is None else past[0].shape[1])
        if past is not None:
            k_BTHK, v_BTHK = torch.cat((past[0], k_BTHK), 1), torch.cat((past[1], v_BTHK), 1)
        mixed_BTHK = self.attend(q_BTHK, k_BTHK.type_as(v_BTHK), v_BTHK, mask_BS)
        return self.out_proj(mixed_BTHK.flatten(-2)), (k_BTHK, v_BTHK)

    def attend(self, q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, mask_BS: Tensor | None) -> Tensor:
        """Attention of each query to the keys up to its own place, queries standing at the end of the keys."""
        n_queries, n_keys = q_BTHK.shape[1], k_BSHK.shape[1]
        plain = mask_BS is None and n_queries == n_keys
        mask = (
            None
            if plain or (n_queries == 1 and mask_BS is None)
            else causal_mask(n_queries, n_keys, mask_BS, q_BTHK.device)
        )
        mixed_BHTK = F.scaled_dot_product_attention(
            q_BTHK.transpose(1, 2).type_as(v_BSHK),
            k_BSHK.transpose(1, 2),
            v_BSHK.transpose(1, 2),
            attn_mask=mask,
            is_causal=plain,
            enable_gqa=self.kv_heads != self.n_heads,
        )
        return mixed_BHTK.transpose(1, 2)


def causal_mask(n_queries: int, n_keys: int, mask_BS: Tensor | None, device: torch.device) -> Tensor:
    """Which keys each query sees, (T, S) or (B, 1, T, S); a query that would see none sees itself."""
    places = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    keys = torch.arange(n_keys, device=device)
    causal_TS = keys <= places
    if mask_BS is None:
        return causal_TS
    return (causal_TS & mask_BS.bool()[:, None, None, :]) | (keys == places)
