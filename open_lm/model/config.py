"""Model flags: an architecture from a registered name or a JSON file, completed by flags."""

from __future__ import annotations

import difflib
import json
import logging
from argparse import Namespace
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from open_lm.errors import ConfigError
from open_lm.flags import flag
from open_lm.model.architecture import MambaConfig, ModelConfig
from open_lm.model.hf_config import HFConfig, resolve_hf
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


@dataclass(frozen=True)
class ModelFlags:
    """Model"""

    model: str | None = flag(
        None,
        "Registered architecture, the path of a JSON file or of a folder of transformers, or hf://owner/name. "
        f"None: that of the checkpoint given, else {DEFAULT}.",
        aliases=("--model-config",),
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
        "What computes attention; auto is torch's own fused attention, or on a CPU that of --cpu-kernels. Equal to all "
        "but custom_attn.",
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
    moe_expert_type: str = flag(
        "ffn",
        "What experts are: ffn, as --ffn-type says; megablocks, as in OpenLM's own models: tanh gelu, 4 times as wide.",
        choices=EXPERT_TYPES,
    )
    moe_backend: str = flag(
        "torch",
        "What multiplies the rows of experts: torch, with its grouped kernel where it runs; or megablocks', on GPUs.",
        choices=GROUPED_PRODUCTS,
    )
    moe_weight_parallelism: bool = flag(
        False, "Accepted and ignored: --fsdp spreads the weights of experts over ranks."
    )
    moe_expert_model_parallelism: bool = flag(
        False, "Accepted and ignored: --fsdp spreads the weights of experts over ranks."
    )
    parametrization: str = flag(
        "standard",
        "How weights begin and learn as the model grows: standard; mup (arXiv:2203.03466) keeps the best --lr over "
        "widths; completep (arXiv:2505.01618) over widths and depths. Keep the width of heads the same.",
        choices=PARAMETRIZATIONS,
    )
    base_width: int = flag(256, "With --parametrization: the width at which --lr means what it says.", least=1)
    base_depth: int = flag(4, "With --parametrization completep: the number of blocks at which it does.", least=1)
    hf_model: str | None = flag(
        None, "Train this model of transformers instead of --model, from its published weights: a hub id or a folder."
    )
    hf_seq_len: int | None = flag(None, "With --hf-model: tokens of a sequence.")
    hf_fsdp_block: str | None = flag(
        None,
        "With --hf-model: class of its repeated blocks, by which FSDP splits it. None: its longest list of modules.",
    )

    def __post_init__(self) -> None:
        for name in ("moe_weight_parallelism", "moe_expert_model_parallelism"):
            if getattr(self, name):
                logging.warning(
                    "--%s is ignored: --fsdp spreads the weights of experts over ranks.", name.replace("_", "-")
                )
        if self.hf_model and self.model:
            raise ConfigError(f"--hf-model {self.hf_model} and --model {self.model} name two models: give one.")
        if not self.hf_model and (self.hf_seq_len or self.hf_fsdp_block):
            raise ConfigError("--hf-seq-len and --hf-fsdp-block belong to --hf-model, which is not given.")


def model_names() -> list[str]:
    """The registered names, without aliases."""
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


def resolve_architecture(flags: ModelFlags) -> ModelConfig:
    """The architecture that the flags name; a key of the JSON wins over its flag.

    Raises:
        ConfigError: no such name or file, not JSON, or a key that is missing, unknown or out of range.
    """
    if flags.hf_model:
        _refuse_parametrization(flags, "--hf-model")
        return cast("ModelConfig", resolve_hf(flags.hf_model, flags.hf_seq_len, flags.hf_fsdp_block))
    path = _config_path(flags.model or DEFAULT)
    values = _read_json(path)
    known = {f.name for f in fields(ModelConfig)} if "d_model" not in values else set()  # no flag concerns a Mamba
    if not known:
        _refuse_parametrization(flags, "a Mamba")
    from_flags = {name: value for name, value in vars(flags).items() if name in known}
    return ModelConfig.from_dict({**from_flags, **values}, f"--model {flags.model or DEFAULT}")


def _refuse_parametrization(flags: ModelFlags, of: str) -> None:
    if flags.parametrization != "standard":
        raise ConfigError(f"--parametrization {flags.parametrization}: not with {of}; only our transformers have one.")


def config_of(config_or_args: ModelConfig | ModelFlags | Namespace) -> ModelConfig:
    """The architecture, however it was given: itself, flags, or parsed arguments."""
    if isinstance(config_or_args, ModelConfig | MambaConfig | HFConfig):
        return config_or_args
    if isinstance(config_or_args, ModelFlags):
        return resolve_architecture(config_or_args)
    names = [f.name for f in fields(ModelFlags) if hasattr(config_or_args, f.name)]
    return resolve_architecture(ModelFlags(**{name: getattr(config_or_args, name) for name in names}))


def _config_path(name: str) -> Path:
    if name.endswith(".json"):
        path = Path(name).expanduser()
        if not path.is_file() and path.parent.name == "model_configs" and path.stem in model_names():
            return CONFIGS / path.name  # OpenLM's path: a link in a clone, nothing in an installed package
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
