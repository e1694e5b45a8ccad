"""The architecture of an OpenLM model in transformers, under the keys of the config.json files that OpenLM published.

The file is complete in itself: it travels with the weights it describes.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import math

from transformers import PretrainedConfig

PUBLISHED_IN = ("params_args_dict", "params")
"""Keys under which some published folders keep the parameters instead of the top level."""

FLAGS = {"hidden_dim": "dim", "model_norm": "norm_type", "qk_norm": "apply_qk_norm"}
"""Parameters that OpenLM's flags and JSON files spell otherwise."""


class OpenLMConfig(PretrainedConfig):
    """The parameters of an OpenLM transformer; `dim`, `norm_type` and `apply_qk_norm` are OpenLM's own names.

    Keys that OpenLM does not have: `n_kv_heads` (None: as many as `n_heads`), `ffn_dim` (None: OpenLM's width for
    `dim`), `rotary_base`, `moe_expert_type` (megablocks: OpenLM's experts; ffn: experts like `ffn_type`), and `window`,
    the keys that a position sees, itself included (None: all; `sliding_window` would shorten transformers' caches).
    """

    model_type = "openlm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "seq_len",
    }

    def __init__(
        self,
        dim=512,
        n_layers=8,
        n_heads=8,
        vocab_size=50432,
        seq_len=2048,
        norm_eps=1e-5,
        norm_type="default_layer_norm",
        apply_qk_norm=False,
        ffn_type="swiglu",
        positional_embedding_type="rotary",
        post_embed_norm=False,
        weight_tying=False,
        attn_name="auto",
        attn_activation=None,
        attn_seq_scalar=None,
        attn_seq_scalar_alpha=None,
        moe_freq=0,
        moe_num_experts=None,
        moe_top_k=2,
        moe_expert_type="megablocks",
        n_kv_heads=None,
        ffn_dim=None,
        rotary_base=10_000.0,
        window=None,
        use_cache=True,
        **kwargs,
    ):
        own = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        nested = next((kwargs.pop(key) for key in PUBLISHED_IN if isinstance(kwargs.get(key), dict)), {})
        published = {FLAGS.get(key, key): value for key, value in nested.items() if value is not None}
        renamed = {FLAGS[key]: kwargs.pop(key) for key in FLAGS if key in kwargs}
        own |= {key: value for key, value in (published | renamed).items() if key in own}
        own["weight_tying"] = bool(kwargs.pop("tie_word_embeddings", False)) or own["weight_tying"]
        own["n_kv_heads"] = own["n_kv_heads"] or own["n_heads"]
        if own["attn_name"] == "custom_attn" and not own["attn_activation"]:
            raise ValueError("attn_name custom_attn needs attn_activation")
        for name, value in own.items():
            setattr(self, name, value)
        super().__init__(tie_word_embeddings=self.weight_tying, **kwargs)

    @property
    def head_dim(self):
        """Width of one head, rounded down where heads do not divide the width."""
        return self.dim // self.n_heads

    @property
    def ffn_width(self):
        """Hidden width of the feed-forward layers."""
        gated = 256 * math.ceil(int(8 * self.dim / 3) / 256)
        return self.ffn_dim or (4 * self.dim if self.ffn_type == "gelu" else gated)

    @property
    def expert_width(self):
        """Hidden width of one expert."""
        return self.ffn_dim or (4 * self.dim if self.moe_expert_type == "megablocks" else self.ffn_width)

    @property
    def softmax(self):
        """Whether attention is the usual one; otherwise `attn_activation` stands in the place of the softmax."""
        return self.attn_name != "custom_attn"
