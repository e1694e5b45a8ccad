"""The layers of an OpenLM model in transformers; the file travels with the weights it loads.

Shapes: B batch, T queries, S keys, D model width, H heads, G heads of keys and values, K head width, F hidden width,
E experts.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def linear(d_in, d_out, std, bias=False):
    """A linear layer that remembers the standard deviation of its first weights."""
    layer = nn.Linear(d_in, d_out, bias=bias)
    layer.init_std = std
    return layer


def last_std(width, layer):
    """Deviation of a projection into the residual stream: smaller in later layers, so that their sum stays small."""
    return width**-0.5 / math.sqrt(2 * (layer + 1))


class Norm(nn.Module):
    """The six norms; statistics in fp32 but for those with `lp` in their name."""

    def __init__(self, config, dim):
        super().__init__()
        self.kind, self.dim, self.eps = config.norm_type, dim, config.norm_eps
        has_bias = self.kind in ("default_layer_norm", "lp_layer_norm")
        self.weight = nn.Parameter(torch.ones(dim)) if self.kind != "no_wb_layer_norm" else None
        self.bias = nn.Parameter(torch.zeros(dim)) if has_bias else None

    def forward(self, x):
        if self.kind == "rms_norm":
            return F.rms_norm(x.float(), (self.dim,), None, self.eps).type_as(x) * self.weight
        return F.layer_norm(x, (self.dim,), self.weight, self.bias, self.eps)


class SwiGLU(nn.Module):
    """`w3(silu(gate) * value)`, gate and value packed in `w12`."""

    def __init__(self, dim, width, layer):
        super().__init__()
        self.w12 = linear(dim, 2 * width, dim**-0.5)
        self.w3 = linear(width, dim, last_std(width, layer))

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class GemmaGeGLU(nn.Module):
    """`down(gelu(gate(x)) * up(x))`, with biases."""

    def __init__(self, dim, width, layer):
        super().__init__()
        self.gate_proj = linear(dim, width, dim**-0.5, bias=True)
        self.up_proj = linear(dim, width, dim**-0.5, bias=True)
        self.down_proj = linear(width, dim, last_std(width, layer), bias=True)

    def forward(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """The feed-forward layers of all experts, without biases: `w12` (E, F or 2 F, D) and `w3` (E, D, F)."""

    def __init__(self, config, layer):
        super().__init__()
        n, dim, width = config.moe_num_experts, config.dim, config.expert_width
        self.gated = config.ffn_type != "gelu"
        self.activation = F.silu if config.ffn_type.startswith("swiglu") else F.gelu
        self.w12 = nn.Parameter(torch.empty(n, width * (2 if self.gated else 1), dim))
        self.w3 = nn.Parameter(torch.empty(n, dim, width))
        self.init_stds = {"w12": dim**-0.5, "w3": last_std(width, layer)}

    def forward(self, x, expert):
        hidden = F.linear(x, self.w12[expert])
        gate, value = hidden.chunk(2, dim=-1) if self.gated else (hidden, 1.0)
        return F.linear(self.activation(gate) * value, self.w3[expert])


class MegaBlocksWeights(nn.Module):
    """`w1` (E, D, F) and `w2` (E, F, D), as OpenLM's files have them."""

    def __init__(self, config, layer):
        super().__init__()
        n, dim, width = config.moe_num_experts, config.dim, config.expert_width
        self.w1 = nn.Parameter(torch.empty(n, dim, width))
        self.w2 = nn.Parameter(torch.empty(n, width, dim))
        self.init_stds = {"w1": dim**-0.5, "w2": last_std(width, layer)}


class MegaBlocksExperts(nn.Module):
    """OpenLM's experts: tanh gelu, not gated; `bias` is zero and only there because OpenLM's files hold it."""

    def __init__(self, config, layer):
        super().__init__()
        self.mlp = MegaBlocksWeights(config, layer)
        self.bias = nn.Parameter(torch.zeros(config.dim))
        self.init_stds = {"bias": 0.0}

    def forward(self, x, expert):
        hidden = F.gelu(x @ self.mlp.w1[expert], approximate="tanh")
        return hidden @ self.mlp.w2[expert]


class Router(nn.Module):
    """The router under the name that MegaBlocks gives it."""

    def __init__(self, config):
        super().__init__()
        self.layer = linear(config.dim, config.moe_num_experts, config.dim**-0.5)

    def forward(self, x):
        return self.layer(x)


class MixtureOfExperts(nn.Module):
    """Every token goes through its `moe_top_k` likeliest experts, weighted by their probabilities."""

    def __init__(self, config, layer):
        super().__init__()
        megablocks = config.moe_expert_type == "megablocks"
        self.n_experts, self.top_k = config.moe_num_experts, config.moe_top_k
        self.router = Router(config) if megablocks else linear(config.dim, self.n_experts, config.dim**-0.5)
        self.experts = (MegaBlocksExperts if megablocks else Experts)(config, layer)

    def forward(self, x):
        tokens = x.flatten(0, -2)
        weights, chosen = self.router(tokens).float().softmax(-1).topk(self.top_k, dim=-1)
        out = torch.zeros_like(tokens)
        for expert in range(self.n_experts):
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            mixed = self.experts(tokens[rows], expert) * weights[rows, places, None].to(x.dtype)
            out = out.index_add(0, rows, mixed.to(out.dtype))
        return out.view_as(x)


def feed_forward(config, layer):
    """The feed-forward layer of block number `layer`."""
    dim, width = config.dim, config.ffn_width
    if config.moe_freq and layer % config.moe_freq == 0:
        return MixtureOfExperts(config, layer)
    if config.ffn_type == "gelu":
        up, down = linear(dim, width, dim**-0.5), linear(width, dim, last_std(width, layer))
        return nn.Sequential(up, nn.GELU(), down)
    return (GemmaGeGLU if config.ffn_type == "gemma_geglu" else SwiGLU)(dim, width, layer)


ACTIVATIONS = {
    "relu": F.relu,
    "relu_squared": lambda scores: F.relu(scores).square(),
    "softplus": F.softplus,
    "identity": lambda scores: scores,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "softmax": lambda scores: scores.softmax(-1),
}
SEQ_SCALARS = {None: lambda n: 1.0, "none": lambda n: 1.0, "max": lambda n: n * 1.0, "avg": lambda n: (n - 1) / 2 + 1}


class Attention(nn.Module):
    """Causal self-attention; queries, keys and values packed in `in_proj`."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer, self.head_dim = config, layer, config.head_dim
        q_width, kv_width = config.n_heads * self.head_dim, config.n_kv_heads * self.head_dim
        self.widths = [q_width, kv_width, kv_width]
        self.in_proj = linear(config.dim, sum(self.widths), config.dim**-0.5)
        self.out_proj = linear(q_width, config.dim, last_std(config.dim, layer))
        self.q_norm = Norm(config, q_width) if config.apply_qk_norm else nn.Identity()
        self.k_norm = Norm(config, kv_width) if config.apply_qk_norm else nn.Identity()

    def forward(self, x, angles, mask, cache, cache_position):
        q, k, v = self.in_proj(x).split(self.widths, dim=-1)
        q = self.rotated(self.q_norm(q).unflatten(-1, (-1, self.head_dim)), angles).type_as(v).transpose(1, 2)
        k = self.rotated(self.k_norm(k).unflatten(-1, (-1, self.head_dim)), angles).type_as(v).transpose(1, 2)
        v = v.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer, {"cache_position": cache_position})
        return self.out_proj(self.attend(q, k, v, mask).transpose(1, 2).flatten(-2))

    def rotated(self, x_BTHK, angles):
        """Rotary position embedding: by position, by number of the head, over halves or pairs of channels."""
        kind = self.config.positional_embedding_type
        if kind == "none":
            return x_BTHK
        cos, sin = angles.cos(), angles.sin()
        if kind == "head_rotary":
            cos, sin = cos[: x_BTHK.shape[2]], sin[: x_BTHK.shape[2]]
        if kind == "llama_rotary":
            a, b = x_BTHK.float().unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).type_as(x_BTHK)
        a, b = x_BTHK.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).type_as(x_BTHK)

    def attend(self, q, k, v, mask):
        """Softmax attention, or the activation in its place; `mask` is true where a query sees a key, None: causal."""
        if self.config.softmax:
            causal = mask is None and q.shape[2] > 1
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        scores = (q @ k.transpose(-1, -2) * self.head_dim**-0.5).masked_fill(~mask, -torch.inf)
        weights = ACTIVATIONS[self.config.attn_activation](scores).masked_fill(~mask, 0.0)
        new = mask[..., -q.shape[2] :]  # keys of the sequence: those seen, and later positions, which see this one
        length = (mask.sum(-1) + new.sum(-2) - new.diagonal(dim1=-2, dim2=-1).long())[..., None]
        scale = SEQ_SCALARS[self.config.attn_seq_scalar](length) ** -(self.config.attn_seq_scalar_alpha or 0.0)
        return (weights * scale).type_as(v) @ v


class Block(GradientCheckpointingLayer):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`."""

    def __init__(self, config, layer):
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = feed_forward(config, layer)
        self.attention_norm = Norm(config, config.dim)
        self.ffn_norm = Norm(config, config.dim)

    def forward(self, x, angles, mask, past_key_values=None, cache_position=None):
        x = x + self.attention(self.attention_norm(x), angles, mask, past_key_values, cache_position)
        return x + self.feed_forward(self.ffn_norm(x))
