"""Causal self-attention.

Shapes: B batch, T positions, D model width, H heads, G heads of keys and values, K head width.
"""

from __future__ import annotations

from torch import Tensor, nn

from open_lm.errors import ConfigError
from open_lm.model.attention_core import build_attend
from open_lm.model.cache import LayerCache
from open_lm.model.config import ModelConfig
from open_lm.model.init import scaled_normal_
from open_lm.model.mask import Mask
from open_lm.model.norms import build_norm
from open_lm.model.parametrization import branch_divisor
from open_lm.model.rotary import Angles
from open_lm.model.split import Features, SplitColumns, SplitRows, TensorPlan
from open_lm.model.variants import POSITIONS


class Attention(nn.Module):
    """Multi-head (or grouped-query) attention; `in_proj` packs queries, keys and values in that order."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.dim, self.branch_divisor = config.hidden_dim, branch_divisor(config, layer)
        self.n_heads, self.kv_heads, self.head_dim = config.n_heads, config.kv_heads, config.head_dim
        q_width, kv_width = self.n_heads * self.head_dim, self.kv_heads * self.head_dim
        self.widths = [q_width, kv_width, kv_width]
        self.in_proj = nn.Linear(self.dim, sum(self.widths), bias=False)
        self.out_proj = nn.Linear(q_width, self.dim, bias=False)
        self.pos_embed = POSITIONS.load(config.positional_embedding_type)(config)
        self.qk_norm = config.qk_norm
        self.q_norm = build_norm(config, q_width) if config.qk_norm else nn.Identity()
        self.k_norm = build_norm(config, kv_width) if config.qk_norm else nn.Identity()
        self.attend = build_attend(config)
        self.is_softmax = config.attn_name != "custom_attn"

    def tensor_plan(self) -> TensorPlan:
        """Whole heads for each rank, with the keys and values that they read."""
        plan: TensorPlan = {"in_proj": SplitRows(tuple(self.widths)), "out_proj": SplitColumns()}
        return plan | ({"q_norm": Features(), "k_norm": Features()} if self.qk_norm else {})

    @property
    def key_shape(self) -> tuple[int, int]:
        """Heads of keys and values, and their width, as they are here."""
        return self.widths[1] // self.head_dim, self.head_dim

    def require_parts(self, n_parts: int) -> None:
        """Raise ConfigError where the heads do not divide among `n_parts` ranks."""
        if self.kv_heads % n_parts:
            raise ConfigError(
                f"--mesh tp={n_parts}: {self.kv_heads} heads of keys and values do not divide among {n_parts} ranks."
            )

    def keep_part(self, part: int, n_parts: int) -> None:
        """Compute with one of `n_parts` equal parts of the heads."""
        self.widths = [width // n_parts for width in self.widths]
        self.pos_embed.part = part

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        """The rows of each matrix that a parameter packs, for optimizers that work on matrices."""
        return {"in_proj.weight": tuple(self.widths)}

    def reset_parameters(self) -> None:
        """in_proj: 1/sqrt(D); out_proj: 1/sqrt(D) / branch_divisor."""
        scaled_normal_(self.in_proj.weight, self.dim**-0.5)
        scaled_normal_(self.out_proj.weight, self.dim**-0.5 / self.branch_divisor)

    def forward(self, x_BTD: Tensor, angles: Angles | None, mask: Mask, cache: LayerCache | None = None) -> Tensor:
        q, k, v = self.in_proj(x_BTD).split(self.widths, dim=-1)
        q_BTHK = self.q_norm(q).unflatten(-1, (-1, self.head_dim))
        k_BTGK = self.k_norm(k).unflatten(-1, (-1, self.head_dim))
        v_BTGK = v.unflatten(-1, (-1, self.head_dim))
        q_BTHK = self.pos_embed(q_BTHK, angles).type_as(v_BTGK)
        k_BTGK = self.pos_embed(k_BTGK, angles).type_as(v_BTGK)
        if cache is not None:
            k_BTGK, v_BTGK = cache.append(k_BTGK, v_BTGK)
        return self.out_proj(mask.apply(self.attend, q_BTHK, k_BTGK, v_BTGK).flatten(-2))
