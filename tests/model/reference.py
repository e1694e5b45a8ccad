"""References of every architecture, written independently in fp64: textbook formulas, no code of the package."""

import math

import numpy as np
import torch

ACTIVATIONS = {
    "relu": lambda s: s.clamp(min=0),
    "relu_squared": lambda s: s.clamp(min=0) ** 2,
    "softplus": lambda s: (1 + s.exp()).log(),
    "identity": lambda s: s,
    "relu6": lambda s: s.clamp(0, 6),
    "sigmoid": lambda s: 1 / (1 + (-s).exp()),
    "softmax": lambda s: s.exp() / s.exp().sum(),
}


def reference_logits(state, config, ids):
    """Logits (T, V) of one sequence `ids` (T,) for the weights in `state`."""
    w = {name: tensor.double() for name, tensor in state.items()}
    x = w["tok_embeddings.weight"][ids]
    if config.post_embed_norm:
        x = norm(x, w, "post_embed_norm", config)
    for n in range(config.n_layers):
        x = x + attention(norm(x, w, f"layers.{n}.attention_norm", config), w, f"layers.{n}.attention.", config)
        x = x + feed_forward(norm(x, w, f"layers.{n}.ffn_norm", config), w, f"layers.{n}.feed_forward.", config)
    return norm(x, w, "norm", config) @ w["output.weight"].T


def norm(x, w, name, config):
    if config.model_norm == "rms_norm":
        return x / ((x**2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * w[f"{name}.weight"]
    centred = x - x.mean(-1, keepdim=True)
    y = centred / ((centred**2).mean(-1, keepdim=True) + config.norm_eps).sqrt()
    return y * w.get(f"{name}.weight", 1.0) + w.get(f"{name}.bias", 0.0)


def feed_forward(x, w, name, config):
    def gelu(z):
        return z * 0.5 * (1 + torch.special.erf(z / math.sqrt(2)))

    if config.ffn_type == "gelu":
        return gelu(x @ w[f"{name}0.weight"].T) @ w[f"{name}2.weight"].T
    if config.ffn_type == "gemma_geglu":
        gate, up = (x @ w[f"{name}{p}_proj.weight"].T + w[f"{name}{p}_proj.bias"] for p in ("gate", "up"))
        return (gelu(gate) * up) @ w[f"{name}down_proj.weight"].T + w[f"{name}down_proj.bias"]
    both = x @ w[f"{name}w12.weight"].T
    gate, value = both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]
    return (gate / (1 + (-gate).exp()) * value) @ w[f"{name}w3.weight"].T


def attention(x, w, name, config):
    d, n_heads, n_kv = config.head_dim, config.n_heads, config.n_kv_heads or config.n_heads
    qkv = x @ w[f"{name}in_proj.weight"].T
    q, k, v = qkv[:, : n_heads * d], qkv[:, n_heads * d : (n_heads + n_kv) * d], qkv[:, (n_heads + n_kv) * d :]
    if config.qk_norm:
        q, k = norm(q, w, f"{name}q_norm", config), norm(k, w, f"{name}k_norm", config)
    out = torch.zeros(len(x), n_heads * d, dtype=torch.float64)
    for h in range(n_heads):
        g = h // (n_heads // n_kv)
        qh = rotated(q[:, h * d : (h + 1) * d], h, config)
        kh = rotated(k[:, g * d : (g + 1) * d], g, config)
        for t in range(len(x)):
            first = max(0, t + 1 - config.sliding_window) if config.sliding_window else 0
            scores = kh[first : t + 1] @ qh[t] / math.sqrt(d)
            weights = ACTIVATIONS[config.attn_activation or "softmax"](scores) * scalar(len(x), config)
            out[t, h * d : (h + 1) * d] = weights @ v[first : t + 1, g * d : (g + 1) * d]
    return out @ w[f"{name}out_proj.weight"].T


def scalar(length, config):
    lengths = {"max": length, "avg": (length - 1) / 2 + 1, "none": 1, None: 1}
    return lengths[config.attn_seq_scalar] ** -(config.attn_seq_scalar_alpha or 0)


def rotated(x, head, config):
    """Rotation as multiplication of complex numbers, one per pair of channels."""
    kind, (length, d) = config.positional_embedding_type, x.shape
    if kind == "none":
        return x
    places = np.full(length, head) if kind == "head_rotary" else np.arange(length)
    turn = torch.from_numpy(np.exp(1j * np.outer(places, config.rotary_base ** (-np.arange(0, d, 2) / d))))
    if kind == "llama_rotary":
        return torch.view_as_real(torch.complex(x[:, 0::2].contiguous(), x[:, 1::2].contiguous()) * turn).flatten(1)
    y = torch.complex(x[:, : d // 2].contiguous(), x[:, d // 2 :].contiguous()) * turn
    return torch.cat((y.real, y.imag), 1)
