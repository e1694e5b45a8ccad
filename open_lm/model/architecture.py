"""Architecture of a transformer or a Mamba: every number and variant, checked."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar, Protocol, TypeVar, cast

from open_lm.errors import ConfigError
from open_lm.model.hf_config import HFConfig, attention_flops
from open_lm.model.variants import (
    ATTENTIONS,
    ATTN_ACTIVATIONS,
    EXPERT_TYPES,
    FEED_FORWARDS,
    GROUPED_PRODUCTS,
    NORMS,
    PARAMETRIZATIONS,
    POSITIONS,
    SEQ_SCALARS,
)

C = TypeVar("C")

_CHOICES = {
    "model_norm": NORMS,
    "ffn_type": FEED_FORWARDS,
    "positional_embedding_type": POSITIONS,
    "attn_name": ATTENTIONS,
    "attn_activation": ATTN_ACTIVATIONS,
    "attn_seq_scalar": SEQ_SCALARS,
    "moe_backend": GROUPED_PRODUCTS,
}
_SIZES = ("hidden_dim", "n_layers", "n_heads", "seq_len", "vocab_size")


class Architecture(Protocol):
    """Any kind of model as the rest of the program sees it; `kind` is its name in messages."""

    kind: ClassVar[str]
    keeps_documents_apart: ClassVar[bool]
    """Whether attention can stay inside documents (--doc-mask)."""

    @property
    def hidden_dim(self) -> int: ...

    @property
    def n_layers(self) -> int: ...

    @property
    def seq_len(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def is_tied(self) -> bool: ...

    @property
    def mixing_flops_per_token(self) -> int: ...

    @property
    def moe_loss_weight(self) -> float: ...

    def has_experts(self, layer: int) -> bool: ...

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class ModelConfig:
    """A complete architecture: what `create_model` builds, and what a checkpoint keeps.

    `n_kv_heads` None means as many as `n_heads`; `ffn_dim` None the width that OpenLM derives from `hidden_dim`;
    `parametrization` says how weights begin and learn as width and depth leave `base_width` and `base_depth`;
    `sliding_window` None that a position sees all before it, else only so many, itself included (arXiv:2004.05150).
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
    sliding_window: int | None = None
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
    moe_expert_type: str = "ffn"
    moe_backend: str = "torch"
    parametrization: str = "standard"
    base_width: int = 256
    base_depth: int = 4

    def __post_init__(self) -> None:
        for name in _SIZES:
            _require_count(name, getattr(self, name))
        for name in ("n_kv_heads", "ffn_dim", "sliding_window"):
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
        self._check_parametrization()

    def _check_parametrization(self) -> None:
        if self.parametrization not in PARAMETRIZATIONS:
            choices = ", ".join(PARAMETRIZATIONS)
            raise ConfigError(f"model key parametrization: found {self.parametrization!r}, choose one of {choices}.")
        for name in ("base_width", "base_depth"):
            _require_count(name, getattr(self, name))
        if self.parametrization != "standard" and (self.weight_tying or self.moe_freq):
            found = "weight_tying" if self.weight_tying else "experts (--moe-freq)"
            raise ConfigError(
                f"--parametrization {self.parametrization} does not go with {found}: the scale of a matrix follows "
                "from its one place in the model. Leave one out."
            )

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
        if self.sliding_window and self.attn_seq_scalar not in (None, "none"):
            raise ConfigError(
                f"model key sliding_window: not with --attn-seq-scalar {self.attn_seq_scalar}, which scales attention "
                "by the length of the whole sequence. Leave out one."
            )

    def _check_experts(self) -> None:
        for name in ("moe_freq", "moe_capacity_factor", "moe_loss_weight"):
            _require_number(name, getattr(self, name), zero=True)
        if not isinstance(self.moe_freq, int):
            raise ConfigError(f"model key moe_freq: found {self.moe_freq!r}, need a whole number of layers.")
        if self.moe_expert_type not in EXPERT_TYPES:
            raise ConfigError(f"model key moe_expert_type: found {self.moe_expert_type!r}, choose ffn or megablocks.")
        _require_count("moe_top_k", self.moe_top_k)
        if self.moe_num_experts is not None:
            _require_count("moe_num_experts", self.moe_num_experts)
        if self.moe_freq and (self.moe_num_experts or 0) < self.moe_top_k:
            raise ConfigError(
                f"--moe-freq {self.moe_freq} makes layers of experts, of which each token takes --moe-top-k "
                f"{self.moe_top_k}: found --moe-num-experts {self.moe_num_experts}. Give at least as many."
            )

    kind: ClassVar[str] = "a transformer of --model"
    keeps_documents_apart: ClassVar[bool] = True

    @property
    def is_tied(self) -> bool:
        """Whether token embedding and output are one matrix."""
        return self.weight_tying

    @property
    def mixing_flops_per_token(self) -> int:
        """Training FLOPs of attention, scores and mixing."""
        return attention_flops(self.n_layers, self.n_heads * self.head_dim, self.seq_len, self.sliding_window)

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
        """The architecture in `values`, as `to_dict` or a JSON file holds it: by its keys, of any kind of model.

        Raises:
            ConfigError: a key is missing, unknown, or has a value out of range; `origin` names the place.
        """
        if cls is ModelConfig and "d_model" in values:
            return cast("ModelConfig", from_keys(MambaConfig, values, origin))  # it has what users of a config read
        if cls is ModelConfig and "hf_model" in values:
            return cast("ModelConfig", from_keys(HFConfig, values, origin))
        return from_keys(cls, values, origin)


@dataclass(frozen=True)
class MambaConfig:
    """A Mamba (arXiv:2312.00752), with the keys of mamba-ssm; `dt_rank` None means ceil(d_model / 16)."""

    d_model: int
    n_layer: int
    vocab_size: int
    seq_len: int
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None
    tie_embeddings: bool = True
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layer", "vocab_size", "seq_len", "d_state", "d_conv", "expand"):
            _require_count(name, getattr(self, name))
        if self.dt_rank is not None:
            _require_count("dt_rank", self.dt_rank)
        _require_number("norm_eps", self.norm_eps)
        if not isinstance(self.tie_embeddings, bool):
            raise ConfigError(f"model key tie_embeddings: found {self.tie_embeddings!r}, need true or false.")

    kind: ClassVar[str] = "a Mamba"
    keeps_documents_apart: ClassVar[bool] = False

    @property
    def is_tied(self) -> bool:
        """Whether token embedding and output are one matrix."""
        return self.tie_embeddings

    @property
    def mixing_flops_per_token(self) -> int:
        """Training FLOPs of the selective scan."""
        return 18 * self.n_layer * self.inner_dim * self.d_state

    @property
    def hidden_dim(self) -> int:
        """Width of the residual stream, under the transformers' name."""
        return self.d_model

    @property
    def n_layers(self) -> int:
        """Number of blocks, under the transformers' name."""
        return self.n_layer

    @property
    def moe_loss_weight(self) -> float:
        """Nothing: a Mamba has no experts."""
        return 0.0

    def has_experts(self, layer: int) -> bool:
        """Never."""
        return False

    @property
    def inner_dim(self) -> int:
        """Channels of a block."""
        return self.expand * self.d_model

    @property
    def step_rank(self) -> int:
        """Rank of the projection that gives each channel its step."""
        return self.dt_rank or math.ceil(self.d_model / 16)

    def to_dict(self) -> dict[str, Any]:
        """The architecture as plain values, readable by `ModelConfig.from_dict`."""
        return asdict(self)


def from_keys(cls: type[C], values: Mapping[str, Any], origin: str) -> C:
    """An architecture of class `cls` with `values`; errors name `origin`."""
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
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
