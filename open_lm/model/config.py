"""What a model looks like: its architecture, from a registered name or a JSON file, completed by flags."""

from __future__ import annotations

import difflib
import json
import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from open_lm.errors import ConfigError
from open_lm.flags import flag
from open_lm.model.variants import ATTENTIONS, ATTN_ACTIVATIONS, FEED_FORWARDS, NORMS, POSITIONS, SEQ_SCALARS

CONFIGS = Path(__file__).parent / "configs"

DEFAULT = "open_lm_1b"

ALIASES = {
    "quark_neox": "open_lm_11m",
    "atom_neox": "open_lm_25m",
    "aphid_neox": "open_lm_87m",
    "ant_neox": "open_lm_160m",
    "potato_neox": "open_lm_410m",
    "open_lm_411m": "open_lm_410m",
    "marmot_neox": "open_lm_830m",
    "m1b_neox": "open_lm_1b",
    "g3b_neox": "open_lm_3b",
    "l7b_neox": "open_lm_7b",
}
"""Further names of registered architectures."""

_CHOICES = {
    "model_norm": NORMS,
    "ffn_type": FEED_FORWARDS,
    "positional_embedding_type": POSITIONS,
    "attn_name": ATTENTIONS,
    "attn_activation": ATTN_ACTIVATIONS,
    "attn_seq_scalar": SEQ_SCALARS,
}
_SIZES = ("hidden_dim", "n_layers", "n_heads", "seq_len", "vocab_size")


@dataclass(frozen=True)
class ModelConfig:
    """A complete architecture: what `create_model` builds, and what a checkpoint keeps.

    `n_kv_heads` None means as many as `n_heads`; `ffn_dim` None the width that OpenLM derives from `hidden_dim`.
    """

    hidden_dim: int
    n_layers: int
    n_heads: int
    seq_len: int
    vocab_size: int
    post_embed_norm: bool = False
    weight_tying: bool = False
    n_kv_heads: int | None = None
    ffn_dim: int | None = None
    norm_eps: float = 1e-5
    rotary_base: float = 10_000.0
    model_norm: str = "default_layer_norm"
    ffn_type: str = "swiglu"
    qk_norm: bool = False
    positional_embedding_type: str = "rotary"
    attn_name: str = "auto"
    attn_activation: str | None = None
    attn_seq_scalar: str | None = None
    attn_seq_scalar_alpha: float | None = None
    moe_freq: int = 0
    moe_num_experts: int | None = None
    moe_top_k: int = 2
    moe_capacity_factor: float = 1.25
    moe_loss_weight: float = 0.1

    def __post_init__(self) -> None:
        for name in _SIZES:
            _require_count(name, getattr(self, name))
        for name in ("n_kv_heads", "ffn_dim"):
            if getattr(self, name) is not None:
                _require_count(name, getattr(self, name))
        for name in ("norm_eps", "rotary_base"):
            _require_number(name, getattr(self, name))
        for name, registry in _CHOICES.items():
            _require_choice(name, getattr(self, name), registry)
        for name in ("post_embed_norm", "weight_tying", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"model key {name}: found {getattr(self, name)!r}, need true or false.")
        self._check_heads()
        self._check_custom_attention()
        self._check_experts()

    def _check_heads(self) -> None:
        if self.head_dim < 1:
            raise ConfigError(
                f"model keys: {self.n_heads} n_heads do not fit hidden_dim {self.hidden_dim}. Use fewer heads."
            )
        if self.n_heads % self.kv_heads:
            raise ConfigError(f"model key n_kv_heads: {self.n_kv_heads} does not divide the {self.n_heads} n_heads.")
        if self.positional_embedding_type != "none" and self.head_dim % 2:
            raise ConfigError(
                f"model keys: hidden_dim {self.hidden_dim} // n_heads {self.n_heads} makes heads {self.head_dim} wide, "
                f"but {self.positional_embedding_type} turns pairs of channels. Choose other n_heads."
            )

    def _check_custom_attention(self) -> None:
        given = [
            n for n in ("attn_activation", "attn_seq_scalar", "attn_seq_scalar_alpha") if getattr(self, n) is not None
        ]
        if given and self.attn_name != "custom_attn":
            raise ConfigError(f"{_spelled(given[0])} needs --attn-name custom_attn, found {self.attn_name}.")
        if self.attn_name == "custom_attn" and self.attn_activation is None:
            raise ConfigError(f"--attn-name custom_attn needs --attn-activation: one of {', '.join(ATTN_ACTIVATIONS)}.")
        if self.attn_seq_scalar_alpha is not None:
            _require_number("attn_seq_scalar_alpha", self.attn_seq_scalar_alpha)
        elif self.attn_seq_scalar not in (None, "none"):
            raise ConfigError(f"--attn-seq-scalar {self.attn_seq_scalar} needs its exponent, --attn-seq-scalar-alpha.")

    def _check_experts(self) -> None:
        for name in ("moe_freq", "moe_capacity_factor", "moe_loss_weight"):
            _require_number(name, getattr(self, name), zero=True)
        if not isinstance(self.moe_freq, int):
            raise ConfigError(f"model key moe_freq: found {self.moe_freq!r}, need a whole number of layers.")
        _require_count("moe_top_k", self.moe_top_k)
        if self.moe_num_experts is not None:
            _require_count("moe_num_experts", self.moe_num_experts)
        if self.moe_freq and (self.moe_num_experts or 0) < self.moe_top_k:
            raise ConfigError(
                f"--moe-freq {self.moe_freq} makes layers of experts, of which each token takes --moe-top-k "
                f"{self.moe_top_k}: found --moe-num-experts {self.moe_num_experts}. Give at least as many."
            )

    def has_experts(self, layer: int) -> bool:
        """Whether block number `layer`, counted from 0, is a mixture of experts: 0 and every `moe_freq`-th after it."""
        return self.moe_freq > 0 and layer % self.moe_freq == 0

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
    def from_dict(cls, values: Mapping[str, Any], origin: str = "model config") -> ModelConfig:
        """The architecture in `values`, as `to_dict` or a JSON file holds it.

        Raises:
            ConfigError: a key is missing, unknown, or has a value out of range; `origin` names the place.
        """
        known = {f.name: f for f in fields(cls)}
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                raise ConfigError(f"{origin}: unknown key {key!r}{f': did you mean {close[0]}?' if close else '.'}")
        missing = [name for name, f in known.items() if f.default is MISSING and name not in values]
        if missing:
            raise ConfigError(f"{origin}: missing {', '.join(missing)}. Add what the architecture needs.")
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from error


@dataclass(frozen=True)
class ModelFlags:
    """Model"""

    model: str | None = flag(
        None,
        f"Registered architecture, or the path of a JSON file. None: that of the checkpoint given, else {DEFAULT}.",
    )
    model_norm: str = flag("default_layer_norm", "Norm of every block.", choices=NORMS)
    ffn_type: str = flag("swiglu", "Feed-forward layer of every block.", choices=FEED_FORWARDS)
    qk_norm: bool = flag(False, "Normalise queries and keys, each over all heads at once, before attention.")
    positional_embedding_type: str = flag(
        "rotary",
        "How positions enter attention; head_rotary turns by the number of the head, as published OpenLM models do.",
        choices=POSITIONS,
    )
    attn_name: str = flag(
        "auto",
        "What computes attention; auto is torch's own fused attention, equal to all but custom_attn.",
        choices=ATTENTIONS,
    )
    attn_activation: str | None = flag(
        None, "With custom_attn: the function in the place of the softmax.", choices=ATTN_ACTIVATIONS
    )
    attn_seq_scalar: str | None = flag(
        None,
        "With custom_attn: what L is in the factor L^-alpha on attention: max, the number of keys; avg, the mean "
        "number that queries see; none, no factor.",
        choices=SEQ_SCALARS,
    )
    attn_seq_scalar_alpha: float | None = flag(None, "With custom_attn: the exponent alpha of --attn-seq-scalar.")
    moe_freq: int = flag(
        0, "Every how many blocks, from the first on, the feed-forward layer is a mixture of experts; 0 = none."
    )
    moe_num_experts: int | None = flag(None, "Experts of each such block.")
    moe_top_k: int = flag(2, "Experts that each token goes through.")
    moe_capacity_factor: float = flag(
        1.25, "Assignments an expert takes in training, in even shares; what comes later is dropped. 0 drops nothing."
    )
    moe_loss_weight: float = flag(0.1, "Weight of the load-balancing loss in the training loss.")


def model_names() -> list[str]:
    """The registered names, without aliases."""
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


def resolve(flags: ModelFlags) -> ModelConfig:
    """The architecture that the flags name; a key of the JSON wins over its flag.

    Raises:
        ConfigError: no such name or file, not JSON, or a key that is missing, unknown or out of range.
    """
    path = _config_path(flags.model or DEFAULT)
    values = _read_json(path)
    known = {f.name for f in fields(ModelConfig)}
    from_flags = {name: value for name, value in vars(flags).items() if name in known}
    return ModelConfig.from_dict({**from_flags, **values}, f"--model {flags.model or DEFAULT}")


def config_of(config_or_args: ModelConfig | ModelFlags | Namespace) -> ModelConfig:
    """The architecture, however it was given: itself, flags, or parsed arguments."""
    if isinstance(config_or_args, ModelConfig):
        return config_or_args
    if isinstance(config_or_args, ModelFlags):
        return resolve(config_or_args)
    names = [f.name for f in fields(ModelFlags) if hasattr(config_or_args, f.name)]
    return resolve(ModelFlags(**{name: getattr(config_or_args, name) for name in names}))


def _config_path(name: str) -> Path:
    if name.endswith(".json"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise ConfigError(f"--model {name}: no such file. Give the path of a JSON file or a registered name.")
        return path
    registered = model_names()
    if ALIASES.get(name, name) not in registered:
        close = difflib.get_close_matches(name, [*registered, *ALIASES], n=3)
        near = f"Near: {', '.join(close)}." if close else f"Registered: {', '.join(registered)}."
        raise ConfigError(f"--model {name}: no such model. {near} Or give the path of a .json file.")
    return CONFIGS / f"{ALIASES.get(name, name)}.json"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ConfigError(f"--model {path}: not readable as JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--model {path}: holds a {type(values).__name__}, not the keys of an architecture.")
    return values


def _spelled(name: str) -> str:
    return "--" + name.replace("_", "-")


def _require_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"model key {name}: found {value!r}, need a whole number above 0.")


def _require_number(name: str, value: Any, *, zero: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
    if not is_number or (value == 0 and not zero):
        raise ConfigError(f"model key {name}: found {value!r}, need {'0 or more' if zero else 'a number above 0'}.")


def _require_choice(name: str, value: Any, registry: Mapping[str, str]) -> None:
    if value is None and name.startswith("attn_") and name != "attn_name":
        return
    if not isinstance(value, str) or value not in registry:
        raise ConfigError(f"model key {name}: found {value!r}, choose one of {', '.join(registry)}.")
