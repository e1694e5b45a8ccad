"""The models: `create_model` builds one from its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def create_model(config_or_args: Any) -> nn.Module:
    """A freshly initialised model of a ModelConfig, of ModelFlags or of parsed flags."""
    from open_lm.model.config import config_of
    from open_lm.model.transformer import Transformer

    return Transformer(config_of(config_or_args))
