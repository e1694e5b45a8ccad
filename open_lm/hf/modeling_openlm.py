"""OpenLM models in transformers: this file is complete in itself and travels with the weights it loads.

Load a folder that holds it with `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`.
Shapes: B batch, T queries, S keys, D model width, H heads, G heads of keys and values, K head width, V vocabulary.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast


class OpenLMConfig(PretrainedConfig):
    """The architecture, under OpenLM's names."""

    model_type = "open_lm"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "hidden_dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "seq_len",
    }

    def __init__(
        self,
        hidden_dim=16,
        n_layers=2,
        n_heads=2,
        seq_len=16,
        vocab_size=16,
        ffn_width=256,
        n_kv_heads=None,
        norm_eps=1e-5,
        rotary_base=10_000.0,
        model_norm="default_layer_norm",
        ffn_type="swiglu",
        positional_embedding_type="rotary",
        qk_norm=False,
        post_embed_norm=False,
        attn_activation=None,
        attn_seq_scalar=None,
        attn_seq_scalar_alpha=None,
        moe_freq=0,
        moe_num_experts=None,
        moe_top_k=2,
        moe_expert_type="ffn",
        expert_width=None,
        **kwargs,
    ):
        self.hidden_dim, self.n_layers, self.n_heads = hidden_dim, n_layers, n_heads
        self.seq_len, self.vocab_size, self.ffn_width = seq_len, vocab_size, ffn_width
        self.n_kv_heads = n_kv_heads or n_heads
        self.norm_eps, self.rotary_base = norm_eps, rotary_base
        self.model_norm, self.ffn_type = model_norm, ffn_type
        self.positional_embedding_type = positional_embedding_type
        self.qk_norm, self.post_embed_norm = qk_norm, post_embed_norm
        self.attn_activation, self.attn_seq_scalar = attn_activation, attn_seq_scalar
        self.attn_seq_scalar_alpha = attn_seq_scalar_alpha
        self.moe_freq, self.moe_num_experts, self.moe_top_k = moe_freq, moe_num_experts, moe_top_k
        self.moe_expert_type, self.expert_width = moe_expert_type, expert_width or ffn_width
        super().__init__(**kwargs)


class Norm(nn.Module):
    """The six norms; statistics in fp32 but for those with `lp` in their name."""

    def __init__(self, config, dim):
        super().__init__()
        self.kind, self.dim, self.eps = config.model_norm, dim, config.norm_eps
        has_bias = self.kind in ("default_layer_norm", "lp_layer_norm")
        self.weight = nn.Parameter(torch.ones(dim)) if self.kind != "no_wb_layer_norm" else None
        self.bias = nn.Parameter(torch.zeros(dim)) if has_bias else None

    def forward(self, x):
        if self.kind == "rms_norm":
            return F.rms_norm(x.float(), (self.dim,), None, self.eps).type_as(x) * self.weight
        return F.layer_norm(x, (self.dim,), self.weight, self.bias, self.eps)


class SwiGLU(nn.Module):
    """`w3(silu(gate) * value)`, gate and value packed in `w12`."""

    def __init__(self, dim, width):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * width, bias=False)
        self.w3 = nn.Linear(width, dim, bias=False)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class GemmaGeGLU(nn.Module):
    """`down(gelu(gate(x)) * up(x))`, with biases."""

    def __init__(self, dim, width):
        super().__init__()
        self.gate_proj = nn.Linear(dim, width)
        self.up_proj = nn.Linear(dim, width)
        self.down_proj = nn.Linear(width, dim)

    def forward(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """The feed-forward layers of all experts: `w12` (E, F or 2 F, D) and `w3` (E, D, F), without biases."""

    def __init__(self, config):
        super().__init__()
        tanh, n, dim = config.moe_expert_type == "megablocks", config.moe_num_experts, config.hidden_dim
        self.gated = config.ffn_type != "gelu" and not tanh
        self.activation = F.silu if config.ffn_type.startswith("swiglu") and not tanh else F.gelu
        self.options = {"approximate": "tanh"} if tanh else {}
        width = config.expert_width
        self.w12 = nn.Parameter(torch.empty(n, width * (2 if self.gated else 1), dim))
        self.w3 = nn.Parameter(torch.empty(n, dim, width))

    def forward(self, x, expert):
        hidden = F.linear(x, self.w12[expert])
        gate, value = hidden.chunk(2, dim=-1) if self.gated else (hidden, 1.0)
        return F.linear(self.activation(gate, **self.options) * value, self.w3[expert])


class MixtureOfExperts(nn.Module):
    """Every token goes through its `moe_top_k` likeliest experts, weighted by their probabilities."""

    def __init__(self, config):
        super().__init__()
        self.top_k = config.moe_top_k
        self.router = nn.Linear(config.hidden_dim, config.moe_num_experts, bias=False)
        self.experts = Experts(config)

    def forward(self, x):
        tokens = x.flatten(0, -2)
        weights, chosen = self.router(tokens).float().softmax(-1).topk(self.top_k, dim=-1)
        out = torch.zeros_like(tokens)
        for expert in range(self.router.out_features):
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            mixed = self.experts(tokens[rows], expert) * weights[rows, places, None].to(x.dtype)
            out = out.index_add(0, rows, mixed)
        return out.view_as(x)


def feed_forward(config, layer):
    """The feed-forward layer of block number `layer`."""
    dim, width = config.hidden_dim, config.ffn_width
    if config.moe_freq and layer % config.moe_freq == 0:
        return MixtureOfExperts(config)
    if config.ffn_type == "gelu":
        return nn.Sequential(nn.Linear(dim, width, bias=False), nn.GELU(), nn.Linear(width, dim, bias=False))
    return GemmaGeGLU(dim, width) if config.ffn_type == "gemma_geglu" else SwiGLU(dim, width)


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
        self.config, self.layer = config, layer
        self.head_dim = config.hidden_dim // config.n_heads
        q_width, kv_width = config.n_heads * self.head_dim, config.n_kv_heads * self.head_dim
        self.widths = [q_width, kv_width, kv_width]
        self.in_proj = nn.Linear(config.hidden_dim, sum(self.widths), bias=False)
        self.out_proj = nn.Linear(q_width, config.hidden_dim, bias=False)
        self.q_norm = Norm(config, q_width) if config.qk_norm else nn.Identity()
        self.k_norm = Norm(config, kv_width) if config.qk_norm else nn.Identity()

    def forward(self, x, angles, mask, cache):
        q, k, v = self.in_proj(x).split(self.widths, dim=-1)
        q = self.rotated(self.q_norm(q).unflatten(-1, (-1, self.head_dim)), angles).type_as(v).transpose(1, 2)
        k = self.rotated(self.k_norm(k).unflatten(-1, (-1, self.head_dim)), angles).type_as(v).transpose(1, 2)
        v = v.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        repeats = q.shape[1] // k.shape[1]
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        return self.out_proj(self.attend(q, k, v, mask[..., : k.shape[2]]).transpose(1, 2).flatten(-2))

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
        """Softmax attention, or the activation in its place, under a mask that is true where a query sees a key."""
        if self.config.attn_activation is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        scores = (q @ k.transpose(-1, -2) * self.head_dim**-0.5).masked_fill(~mask, -torch.inf)
        weights = ACTIVATIONS[self.config.attn_activation](scores).masked_fill(~mask, 0.0)
        new = mask[..., -q.shape[2] :]  # keys of the sequence: those seen, and later positions, which see this one
        length = (mask.sum(-1) + new.sum(-2) - new.diagonal(dim1=-2, dim2=-1).long())[..., None]
        scale = SEQ_SCALARS[self.config.attn_seq_scalar](length) ** -(self.config.attn_seq_scalar_alpha or 0.0)
        return (weights * scale).type_as(v) @ v


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`."""

    def __init__(self, config, layer):
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = feed_forward(config, layer)
        self.attention_norm = Norm(config, config.hidden_dim)
        self.ffn_norm = Norm(config, config.hidden_dim)

    def forward(self, x, angles, mask, cache):
        x = x + self.attention(self.attention_norm(x), angles, mask, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class OpenLMForCausalLM(PreTrainedModel, GenerationMixin):
    """The decoder with its output layer."""

    config_class = OpenLMConfig
    base_model_prefix = ""
    _no_split_modules = ["Block"]  # noqa: RUF012
    _tied_weights_keys = {"tok_embeddings.weight": "output.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_dim)
        self.post_embed_norm = Norm(config, config.hidden_dim) if config.post_embed_norm else nn.Identity()
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = Norm(config, config.hidden_dim)
        self.output = nn.Linear(config.hidden_dim, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.tok_embeddings

    def set_input_embeddings(self, value):
        self.tok_embeddings = value

    def get_output_embeddings(self):
        return self.output

    def set_output_embeddings(self, value):
        self.output = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ):
        """Logits of the next tokens; `attention_mask` (B, S) is 0 at padding. `labels` give the mean loss."""
        x = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        n_past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        mask = visible(x.shape[1], n_past, attention_mask, x.device)
        angles = self.angles(n_past, n_past + x.shape[1], x.device)
        x = self.post_embed_norm(x)
        for block in self.layers:
            x = block(x, angles, mask, past_key_values)
        logits = self.output(self.norm(x)[:, -logits_to_keep:] if logits_to_keep else self.norm(x)).float()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def angles(self, start, stop, device):
        """Angles in fp32, (T, 1, K/2) by position or (H, K/2) by head; a constant, so it is not stored."""
        config, head_dim = self.config, self.config.hidden_dim // self.config.n_heads
        frequencies = 1.0 / config.rotary_base ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
        if config.positional_embedding_type == "head_rotary":
            return torch.outer(torch.arange(config.n_heads, device=device).float(), frequencies)
        return torch.outer(torch.arange(start, stop, device=device).float(), frequencies)[:, None, :]


def visible(n_queries, n_past, attention_mask, device):
    """Which keys each query sees, (T, S) or (B, 1, T, S); one that would see none, as in left padding, sees itself."""
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    keys = torch.arange(n_past + n_queries, device=device)
    places = keys[n_past:, None]
    if attention_mask is None:
        return keys <= places
    return ((keys <= places) & attention_mask[:, None, None, : len(keys)].bool()) | (keys == places)
