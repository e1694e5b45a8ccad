"""Tiny models with adapters."""

import torch
from tiny_models import make_model

from open_lm.model.lora import adapt, adapters_of

IDS = torch.randint(0, 53, (2, 20), generator=torch.Generator().manual_seed(0))


def adapted(name="llama", rank=3, scale=2.0, moved=True, **options):
    """A tiny model with adapters that are no longer at their start."""
    model = make_model(name)
    adapt(model, rank, scale, **options)
    if moved:
        generator = torch.Generator().manual_seed(1)
        for layer in adapters_of(model).values():
            layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=generator) * 0.1
            if layer.lora_magnitude is not None:
                layer.lora_magnitude.data *= 1 + 0.1 * torch.rand(layer.lora_magnitude.shape, generator=generator)
    return model
