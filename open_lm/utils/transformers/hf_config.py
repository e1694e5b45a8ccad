"""OpenLM's `hf_config.OpenLMConfig`: made of Params, `OpenLMConfig(create_params(args))`."""

from __future__ import annotations

from typing import Any

from open_lm.hf.classes import own_values
from open_lm.hf.configuration_openlm import OpenLMConfig as PublishedConfig
from open_lm.model.architecture import ModelConfig

__all__ = ["OpenLMConfig"]


class OpenLMConfig(PublishedConfig):
    """The published config, also made of Params."""

    def __init__(self, params: Any = None, **kwargs: Any):
        given = own_values(params) if isinstance(params, ModelConfig) else {}
        if isinstance(params, dict):
            kwargs["params"] = params
        super().__init__(**{**given, **kwargs})
