"""A training step written out by hand in fp64: no blocks, no chunks, no wrappers; the model is a plain function."""

import math

import torch
import torch.nn.functional as F


def rotate(x_BTHK):
    n, width = x_BTHK.shape[1], x_BTHK.shape[3]
    frequency = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(n, dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
    a, b = x_BTHK[..., : width // 2], x_BTHK[..., width // 2 :]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def norm(x, w):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w


def logits(p, tokens_BT, n_layers, n_heads):
    """Default architecture with gain-only norms, from parameters by name."""
    x = p["tok_embeddings.weight"][tokens_BT]
    n, dim = x.shape[1:]
    hidden = torch.full((n, n), -math.inf, dtype=torch.float64).triu(1)
    for i in range(n_layers):
        w = {name.removeprefix(f"layers.{i}."): v for name, v in p.items() if name.startswith(f"layers.{i}.")}
        h = norm(x, w["attention_norm.weight"]) @ w["attention.in_proj.weight"].T
        q, k, v = (part.unflatten(-1, (n_heads, dim // n_heads)) for part in h.split(dim, -1))
        q, k = rotate(q), rotate(k)
        scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(dim // n_heads) + hidden
        mixed = torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v).flatten(-2)
        x = x + mixed @ w["attention.out_proj.weight"].T
        gate, value = (norm(x, w["ffn_norm.weight"]) @ w["feed_forward.w12.weight"].T).chunk(2, -1)
        x = x + (F.silu(gate) * value) @ w["feed_forward.w3.weight"].T
    return norm(x, p["norm.weight"]) @ p["output.weight"].T


def loss(p, tokens_BT, targets_BT, n_layers, n_heads, z_loss=0.0):
    """Mean cross-entropy over targets that are not -100, plus the z-loss."""
    z = logits(p, tokens_BT, n_layers, n_heads)
    counted = targets_BT >= 0
    log_z = z.logsumexp(-1)
    picked = z.gather(-1, targets_BT.clamp(min=0)[..., None])[..., 0]
    return (((log_z - picked) + z_loss * log_z.square()) * counted).sum() / counted.sum()
