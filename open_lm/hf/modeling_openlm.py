"""OpenLM models in transformers: `from open_lm.hf import *`, or without OpenLM from a folder that holds this file.

Beside its weights it is loaded with `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`; names of
weights and keys of the config are those of OpenLM's published folders.
Shapes: B batch, T queries, S keys, D model width, V vocabulary.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import re

import torch
import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_openlm import OpenLMConfig
from .layers_openlm import Block, Experts, MegaBlocksExperts, MegaBlocksWeights, Norm

TIED = {"model.output.weight": "model.tok_embeddings.weight"}
"""The output layer is the token embedding where the config says so."""

UNREAD = [r"pos_embed\.inv_freq$", r"layers\.\d+\._ff_w[12]"]
"""Names in OpenLM's files that hold a constant, or a weight a second time."""


class OpenLMModel(nn.Module):
    """The decoder and, as OpenLM has it, its output layer."""

    def __init__(self, config):
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.post_embed_norm = Norm(config, config.dim) if config.post_embed_norm else nn.Identity()
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = Norm(config, config.dim)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.tok_embeddings.init_std = self.output.init_std = config.dim**-0.5
        self.register_load_state_dict_pre_hook(drop_unread)

    def forward(self, x, angles, mask, cache, cache_position):
        """The hidden states before every block and, normalised, behind the last: n_layers + 1 of them."""
        x = self.post_embed_norm(x)
        states = [x]
        for block in self.layers:
            x = block(x, angles, mask, past_key_values=cache, cache_position=cache_position)
            states.append(x)
        return (*states[:-1], self.norm(x))


class OpenLMForCausalLM(PreTrainedModel, GenerationMixin):
    """An OpenLM transformer as a causal language model of transformers."""

    config_class = OpenLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _tied_weights_keys = TIED if int(transformers.__version__.split(".")[0]) >= 5 else list(TIED)  # type: ignore[assignment]
    _keys_to_ignore_on_load_unexpected = UNREAD
    _supports_sdpa = True
    _can_compile_fullgraph = False

    def __init__(self, config):
        super().__init__(config)
        self.model = OpenLMModel(config)
        self.post_init()

    def _init_weights(self, module):
        """Linear layers and embeddings by the deviation they remember, norms 1 and 0."""
        if isinstance(module, nn.Linear | nn.Embedding) and hasattr(module, "init_std"):
            fill(module.weight, module.init_std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Norm):
            if module.weight is not None:
                nn.init.ones_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Experts | MegaBlocksWeights | MegaBlocksExperts):
            for name, std in module.init_stds.items():
                fill(getattr(module, name), std)

    def get_input_embeddings(self):
        return self.model.tok_embeddings

    def set_input_embeddings(self, value):
        self.model.tok_embeddings = value

    def get_output_embeddings(self):
        return self.model.output

    def set_output_embeddings(self, new_embeddings):
        self.model.output = new_embeddings

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Logits of the next tokens; `attention_mask` (B, S) is 0 at padding.

        `labels` give the mean loss over those that are not -100, or their sum over `num_items_in_batch`.
        `position_ids` change nothing: every embedding here is blind to an offset. Attention weights are not kept.
        """
        if output_attentions:
            raise ValueError("output_attentions: the attention kernels here do not keep their weights")
        x = self.model.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        recomputes = self.training and any(block.gradient_checkpointing for block in self.model.layers)
        if use_cache and past_key_values is None and not recomputes:
            past_key_values = DynamicCache(config=self.config)
        n_past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        cache_position = torch.arange(n_past, n_past + x.shape[1], device=x.device)
        mask = self.visible(cache_position, attention_mask, n_keys(past_key_values, n_past + x.shape[1]))
        states = self.model(x, self.angles(cache_position), mask, past_key_values, cache_position)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        hidden = states[-1] if isinstance(kept, int) else states[-1][:, kept]
        logits = self.model.output(hidden).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=states if wants_states else None,
        )
        wants_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    def angles(self, positions):
        """Angles in fp32, (T, 1, K/2) by position or (H, K/2) by head; a constant, so it is not stored."""
        config, head_dim = self.config, self.config.head_dim
        channels = torch.arange(0, head_dim, 2, device=positions.device).float()
        frequencies = 1.0 / config.rotary_base ** (channels / head_dim)
        if config.positional_embedding_type == "head_rotary":
            return torch.outer(torch.arange(config.n_heads, device=positions.device).float(), frequencies)
        return torch.outer(positions.float(), frequencies)[:, None, :]

    def visible(self, positions, attention_mask, n_keys):
        """Mask of the keys each query sees, (T, S) or (B, 1, T, S); None where that is all before it.

        A query that would see no key, as in left padding, sees itself.
        """
        window = self.config.window
        if attention_mask is None and self.config.softmax and n_keys == len(positions) and window is None:
            return None
        keys = torch.arange(n_keys, device=positions.device)
        causal = keys <= positions[:, None]
        if window is not None:
            causal = causal & (keys > positions[:, None] - window)
        if attention_mask is not None and attention_mask.ndim == 4:
            given = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
            return given if window is None else given & causal[:, : given.shape[-1]]
        if attention_mask is None:
            return causal
        real = nn.functional.pad(attention_mask.bool(), (0, n_keys - attention_mask.shape[1]))[:, None, None]
        return (causal & real) | (keys == positions[:, None])


def drop_unread(module, state_dict, prefix, *args):
    """Take out of a state dict of OpenLM what no parameter here reads."""
    for name in [name for name in state_dict if any(re.search(pattern, name) for pattern in UNREAD)]:
        del state_dict[name]


def n_keys(cache, n_positions):
    """Number of keys that attention gets: all positions so far, or the whole memory of a static cache."""
    layers = getattr(cache, "layers", None)
    return (getattr(layers[0], "max_cache_len", None) if layers else None) or n_positions


def fill(weight, std):
    """First values: normal, cut at three standard deviations."""
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std) if std else nn.init.zeros_(weight)


OpenLMConfig.register_for_auto_class()
OpenLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
