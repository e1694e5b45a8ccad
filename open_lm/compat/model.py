"""A model from OpenLM's arguments, and weights into it: `Params`, `create_params`, `load_model`, `pt_load`, …"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import nn

from open_lm import flags
from open_lm.model.architecture import ModelConfig
from open_lm.model.attention_core import build_attend
from open_lm.model.config import ModelFlags, config_of
from open_lm.model.mask import Mask
from open_lm.model.variants import ATTN_ACTIVATIONS as ACTIVATIONS
from open_lm.model.variants import NORMS
from open_lm.model.variants import SEQ_SCALARS as SCALARS

RENAMED = {"dim": "hidden_dim", "norm_type": "model_norm", "apply_qk_norm": "qk_norm"}
"""Fields of OpenLM's Params that are spelled otherwise here."""

ATTN_ACTIVATIONS = {name: ACTIVATIONS.load(name) for name in ACTIVATIONS}
ATTN_SEQ_SCALARS = {name: SCALARS.load(name) for name in SCALARS}


class Params(ModelConfig):
    """A ModelConfig under OpenLM's field names, with OpenLM's defaults."""

    def __init__(self, dim: int = 512, n_layers: int = 8, n_heads: int = 8, **values: Any):
        values = {"hidden_dim": dim, "n_layers": n_layers, "n_heads": n_heads, "vocab_size": 50432, "seq_len": 2048,
                  **{RENAMED.get(name, name): value for name, value in values.items()}}  # fmt: skip
        known = {f.name for f in fields(ModelConfig)}
        super().__init__(**{name: value for name, value in values.items() if name in known})

    @property
    def dim(self) -> int:
        return self.hidden_dim

    @property
    def norm_type(self) -> str:
        return self.model_norm

    @property
    def apply_qk_norm(self) -> bool:
        return self.qk_norm


def create_params(args: Namespace | ModelConfig) -> Any:
    """The architecture that the parsed flags name: Params; a Mamba or a model of transformers as what it is here."""
    config = config_of(args)
    return Params(**{"dim": config.hidden_dim, **asdict(config)}) if type(config) is ModelConfig else config


def add_model_args(parser: ArgumentParser) -> None:
    """Add the flags of a model to any parser of argparse."""
    flags.add_group(parser, ModelFlags)


def get_norm_class(model_norm: str) -> Callable[..., nn.Module]:
    """A constructor of the norm of that name, called with its width, and `eps` unless that is 1e-5."""
    norm = NORMS.load(model_norm)

    def build(dim: int, eps: float = 1e-5) -> nn.Module:
        return norm(dim, eps)

    return build


def get_attn_func(
    attn_name: str, attn_activation: str | None = None, attn_seq_scalar: str | None = None, alpha: float | None = None
) -> Callable[..., torch.Tensor]:
    """Attention as a function `(queries, keys, values, is_causal, attention_mask=None)` of (B, T, H, K) tensors."""
    attend = build_attend(
        Params(attn_name=attn_name, attn_activation=attn_activation, attn_seq_scalar=attn_seq_scalar,
               attn_seq_scalar_alpha=alpha)
    )  # fmt: skip

    def function(queries: Any, keys: Any, values: Any, is_causal: bool = True, attention_mask: Any = None) -> Any:
        n_keys, device = keys.shape[1], queries.device
        if is_causal or attention_mask is not None:
            mask = Mask(queries.shape[1], n_keys, device, real_BS=attention_mask)
            return attend(queries, keys, values, mask)
        return torch.cat([attend(q, keys, values, Mask(1, n_keys, device)) for q in queries.split(1, dim=1)], dim=1)

    return function


def pt_load(file_path: str, map_location: Any = None) -> Any:
    """The content of a torch.save file, from disk or a remote store; only plain data is read, never code.

    Raises:
        CheckpointError: it is missing, damaged, or holds more than data.
    """
    from open_lm.weights.file import load_file

    content = load_file(file_path)
    return content if map_location in (None, "cpu") else torch.utils._pytree.tree_map(_to(map_location), content)


def _to(device: Any) -> Callable[[Any], Any]:
    return lambda value: value.to(device) if isinstance(value, torch.Tensor) else value


def load_model(
    args: Namespace, model: nn.Module, different_seed: bool = False, filter_keys: bool = False
) -> tuple[int, int | None, int | None]:
    """Put the weights of `args.resume` into `model`; `(epoch, step, seed of the shards)` of the checkpoint.

    Raises:
        CheckpointError: it is missing or damaged, or not of this architecture.
    """
    from open_lm.checkpoint.load_model import is_constant, require_fit, under_every_name
    from open_lm.weights.file import clean_state_dict

    content = pt_load(args.resume)
    inner: Any = getattr(model, "module", model)
    weights = under_every_name(inner, clean_state_dict(content))
    require_fit(inner, weights, str(args.resume))
    inner.load_state_dict({k: v for k, v in weights.items() if not is_constant(k)}, strict=False)
    if "state_dict" not in content:
        return 0, 0, None
    seed = None if different_seed else content.get("shard_shuffle_seed")
    return content.get("epoch", 0), content.get("step"), seed
