"""A reference of llama.cpp's forward pass: fp64, position by position, by the GGUF file's own metadata alone."""

import math

import torch
import torch.nn.functional as F


def logits(metadata, tensors, ids):
    """Logits (T, V) of one row of ids."""
    name = metadata["general.architecture"]
    values = {key.removeprefix(f"{name}."): value for key, value in metadata.items()}
    w = {key: tensor.double() for key, tensor in tensors.items()}
    x = w["token_embd.weight"][torch.tensor(ids)]
    for layer in range(values["block_count"]):
        at = {key.removeprefix(f"blk.{layer}."): t for key, t in w.items() if key.startswith(f"blk.{layer}.")}
        if name == "mamba":
            x = x + mamba(values, at, norm(name, values, x, at, "attn_norm"))
        else:
            x = x + attention(name, values, at, norm(name, values, x, at, "attn_norm"))
            x = x + feed_forward(name, values, at, norm(name, values, x, at, "ffn_norm"))
    x = norm(name, values, x, w, "output_norm")
    return x @ w.get("output.weight", w["token_embd.weight"]).T


def norm(name, values, x, w, which):
    """RMS norm for Llama, OLMoE and Mamba; layer norm for the others, with what gain and bias there are."""
    if name in ("llama", "olmoe", "mamba"):
        eps = values["attention.layer_norm_rms_epsilon"]
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{which}.weight"]
    eps = values["attention.layer_norm_epsilon"]
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    return x * w.get(f"{which}.weight", torch.ones(())) + w.get(f"{which}.bias", torch.zeros(()))


def attention(name, values, at, x):
    """Causal attention; pairs of channels are turned in Llama and OLMo, halves in the others."""
    heads, kv_heads, width = (values[f"attention.{key}"] for key in ("head_count", "head_count_kv", "key_length"))
    if name == "gptneox":
        q, k, v = (x @ at["attn_qkv.weight"].T + at["attn_qkv.bias"]).chunk(3, -1)
    else:
        q, k, v = (x @ at[f"attn_{part}.weight"].T for part in "qkv")
    if "attn_q_norm.weight" in at:
        q, k = norm(name, values, q, at, "attn_q_norm"), norm(name, values, k, at, "attn_k_norm")
    n_turned = values["rope.dimension_count"]
    frequencies = values["rope.freq_base"] ** (-torch.arange(0, n_turned, 2).double() / n_turned)
    angles = torch.outer(torch.arange(len(x)).double(), frequencies)
    mixed = []
    for h in range(heads):
        of = h // (heads // kv_heads)
        turned = [turn(name, part[:, i * width : (i + 1) * width], angles) for part, i in ((q, h), (k, of))]
        scores = turned[0] @ turned[1].T / math.sqrt(width)
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        mixed.append(scores.softmax(-1) @ v[:, of * width : (of + 1) * width])
    return torch.cat(mixed, -1) @ at["attn_output.weight"].T + at.get("attn_output.bias", torch.zeros(()))


def turn(name, x, angles):
    """Rotary embedding of one head."""
    cos, sin = angles.cos(), angles.sin()
    if name in ("llama", "olmo"):
        a, b = x[:, 0::2], x[:, 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(1)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def feed_forward(name, values, at, x):
    """Gated by silu, with experts in OLMoE; gelu in GPT-NeoX."""
    if name == "gptneox":
        hidden = F.gelu(x @ at["ffn_up.weight"].T + at["ffn_up.bias"])
        return hidden @ at["ffn_down.weight"].T + at["ffn_down.bias"]
    if "ffn_gate_inp.weight" not in at:
        hidden = F.silu(x @ at["ffn_gate.weight"].T) * (x @ at["ffn_up.weight"].T)
        return hidden @ at["ffn_down.weight"].T
    shares = (x @ at["ffn_gate_inp.weight"].T).softmax(-1)
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for share, e in zip(*shares[t].topk(values["expert_used_count"]), strict=True):
            gate, up, down = (at[f"ffn_{part}_exps.weight"][e] for part in ("gate", "up", "down"))
            out[t] += share * (down @ (F.silu(gate @ x[t]) * (up @ x[t])))
    return out


def mamba(values, at, x):
    """A Mamba's mixer, step by step."""
    inner, rank, n = (values[f"ssm.{key}"] for key in ("inner_size", "time_step_rank", "state_size"))
    kernel = values["ssm.conv_kernel"]
    signal, gate = (x @ at["ssm_in.weight"].T).split(inner, -1)
    padded = torch.cat((torch.zeros(kernel - 1, inner, dtype=x.dtype), signal))
    state, out = torch.zeros(inner, n, dtype=x.dtype), []
    for t in range(len(x)):
        u = F.silu((padded[t : t + kernel].T * at["ssm_conv1d.weight"]).sum(-1) + at["ssm_conv1d.bias"])
        dt, b, c = (at["ssm_x.weight"] @ u).split((rank, n, n))
        dt = F.softplus(at["ssm_dt.weight"] @ dt + at["ssm_dt.bias"])
        state = state * torch.exp(dt[:, None] * at["ssm_a"]) + dt[:, None] * b * u[:, None]
        out.append((state @ c + at["ssm_d"] * u) * F.silu(gate[t]))
    return torch.stack(out) @ at["ssm_out.weight"].T
