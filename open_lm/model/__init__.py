"""The models: `create_model` builds one from its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from open_lm.flags import late_names

if TYPE_CHECKING:
    from torch import nn


def create_model(config_or_args: Any) -> nn.Module:
    """A freshly initialised model of a ModelConfig, of ModelFlags or of parsed flags, on torch's default device."""
    import torch

    from open_lm.model.config import config_of
    from open_lm.model.init import init_weights
    from open_lm.model.variants import ARCHITECTURES

    config = config_of(config_or_args)
    device = torch.get_default_device()
    with torch.device("meta"):  # torch's own layers would fill their weights a first time, for nothing
        model = ARCHITECTURES.load(type(config).__name__)(config)
    if device.type != "meta":
        model.to_empty(device=device)
        init_weights(model)
    return model


_openlm_names = late_names(__name__, "open_lm.compat.model", ("Params", "create_params"))


def __getattr__(name: str) -> Any:
    if name == "Transformer":
        from open_lm.model.transformer import Transformer

        return Transformer
    return _openlm_names(name)
