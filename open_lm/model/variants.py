"""Registries of model parts: a line here adds a variant to flags, help and checks."""

from __future__ import annotations

from open_lm.flags import Registry

ARCHITECTURES = Registry(
    "architecture",
    {
        "ModelConfig": "open_lm.model.transformer:Transformer",
        "Params": "open_lm.model.transformer:Transformer",
        "MambaConfig": "open_lm.model.mamba:Mamba",
        "HFConfig": "open_lm.model.hf_model:HFModel",
    },
)
NORMS = Registry(
    "norm",
    {
        "default_layer_norm": "open_lm.model.norms:LayerNorm",
        "lp_layer_norm": "open_lm.model.norms:LowPrecisionLayerNorm",
        "gain_only_lp_layer_norm": "open_lm.model.norms:gain_only_lp_layer_norm",
        "gain_only_layer_norm": "open_lm.model.norms:gain_only_layer_norm",
        "no_wb_layer_norm": "open_lm.model.norms:no_wb_layer_norm",
        "rms_norm": "open_lm.model.norms:RMSNorm",
    },
)
FEED_FORWARDS = Registry(
    "feed-forward",
    {
        "swiglu": "open_lm.model.feed_forward:SwiGLU",
        "swiglu_torch": "open_lm.model.feed_forward:SwiGLU",
        "gelu": "open_lm.model.feed_forward:Gelu",
        "gemma_geglu": "open_lm.model.feed_forward:GemmaGeGLU",
    },
)
POSITIONS = Registry(
    "positional embedding",
    {
        "rotary": "open_lm.model.rotary:Rotary",
        "head_rotary": "open_lm.model.rotary:HeadRotary",
        "llama_rotary": "open_lm.model.rotary:LlamaRotary",
        "none": "open_lm.model.rotary:NoPositions",
    },
)
ATTENTIONS = Registry(
    "attention",
    {
        "auto": "open_lm.model.attention_core:fastest_attention",
        "torch_attn": "open_lm.model.attention_core:torch_attention",
        "xformers_attn": "open_lm.model.attention_xformers:xformers_attention",
        "xformers_attn_variable_length": "open_lm.model.attention_xformers:xformers_attention",
        "custom_attn": "open_lm.model.attention_core:custom_attention",
    },
)
PARAMETRIZATIONS = ("standard", "mup", "completep")
EXPERT_TYPES = ("ffn", "megablocks")
GROUPED_PRODUCTS = Registry(
    "back end of experts",
    {
        "torch": "open_lm.model.grouped_mm:through_torch",
        "megablocks": "open_lm.model.grouped_mm:through_megablocks",
    },
)
ATTN_ACTIVATIONS = Registry(
    "attention activation",
    {
        "relu": "torch.nn.functional:relu",
        "relu_squared": "open_lm.model.attention_core:relu_squared",
        "softplus": "torch.nn.functional:softplus",
        "identity": "open_lm.model.attention_core:unchanged",
        "relu6": "torch.nn.functional:relu6",
        "sigmoid": "torch:sigmoid",
        "softmax": "open_lm.model.attention_core:softmax",
    },
)
SEQ_SCALARS = Registry(
    "attention scalar",
    {
        "max": "open_lm.model.attention_core:n_keys",
        "avg": "open_lm.model.attention_core:mean_keys_seen",
        "none": "open_lm.model.attention_core:one",
    },
)
