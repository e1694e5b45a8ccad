"""What a model looks like: its architecture, from a registered name or a JSON file, completed by flags."""

from __future__ import annotations

import difflib
import json
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from open_lm.errors import ConfigError
from open_lm.flags import flag
from open_lm.registry import Registry

CONFIGS = Path(__file__).parent / "configs"

DEFAULT = "open_lm_1b"

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


@dataclass(frozen=True)
class ModelConfig:
    """A complete architecture: what `create_model` builds, and what a checkpoint keeps."""

    hidden_dim: int
    n_layers: int
    n_heads: int
    seq_len: int
    vocab_size: int
    post_embed_norm: bool = False
    weight_tying: bool = False
    n_kv_heads: int | None = None
    model_norm: str = "default_layer_norm"
    ffn_type: str = "swiglu"
    qk_norm: bool = False
    positional_embedding_type: str = "rotary"

    def __post_init__(self) -> None:
        for name in ("hidden_dim", "n_layers", "n_heads", "seq_len", "vocab_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"model key {name}: found {getattr(self, name)!r}, need a whole number above 0.")

    @property
    def head_dim(self) -> int:
        """Width of one head; rounded down where heads do not divide the width."""
        return self.hidden_dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values; fewer than `n_heads` in grouped-query attention (arXiv:2305.13245)."""
        return self.n_kv_heads or self.n_heads

    def to_dict(self) -> dict[str, Any]:
        """The architecture as plain values, readable by `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The architecture that `to_dict` wrote."""
        return cls(**values)


@dataclass(frozen=True)
class ModelFlags:
    """Model"""

    model: str | None = flag(
        None, f"Registered architecture, or the path of a JSON file. None: that of the checkpoint given, else {DEFAULT}."
    )
    model_norm: str = flag("default_layer_norm", "Norm of every block.", choices=NORMS)
    ffn_type: str = flag("swiglu", "Feed-forward layer of every block.", choices=FEED_FORWARDS)
    qk_norm: bool = flag(False, "Normalise queries and keys before attention.")
    positional_embedding_type: str = flag("rotary", "How positions enter attention.", choices=POSITIONS)


def model_names() -> list[str]:
    """The registered names."""
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


def resolve(flags: ModelFlags) -> ModelConfig:
    """The architecture that the flags name; a key of the JSON wins over its flag.

    Raises:
        ConfigError: no such name or file, or a key that is missing or unknown.
    """
    name = flags.model or DEFAULT
    path = Path(name) if name.endswith(".json") else CONFIGS / f"{name}.json"
    if not path.exists():
        close = difflib.get_close_matches(name, model_names(), n=3)
        raise ConfigError(
            f"--model {name}: no such model. Near: {', '.join(close) or ', '.join(model_names())}."
        )
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"--model {path}: not JSON ({error}).") from error
    known = {f.name for f in fields(ModelConfig)}
    if unknown := set(values) - known:
        raise ConfigError(f"--model {path}: unknown keys {', '.join(sorted(unknown))}.")
    from_flags = {name: getattr(flags, name) for name in vars(flags) if name in known}
    try:
        return ModelConfig(**{**from_flags, **values})
    except TypeError as error:
        raise ConfigError(f"--model {path}: {error}.") from error


def config_of(config_or_args: ModelConfig | ModelFlags | Namespace) -> ModelConfig:
    """The architecture, however it was given."""
    if isinstance(config_or_args, ModelConfig):
        return config_or_args
    if isinstance(config_or_args, ModelFlags):
        return resolve(config_or_args)
    return resolve(
        ModelFlags(
            **{f.name: getattr(config_or_args, f.name) for f in fields(ModelFlags) if hasattr(config_or_args, f.name)}
        )
    )
