"""OpenLM: train, score and sample language models; `load_model` and `generate` are the library's front door."""

from typing import Any

__version__ = "1.0.0.dev0"
__all__ = ["generate", "load_model"]


def __getattr__(name: str) -> Any:
    if name == "load_model":
        from open_lm.checkpoint.load_model import load_model

        return load_model
    if name == "generate":
        from open_lm.generation import generate

        return generate
    raise AttributeError(f"module 'open_lm' has no attribute {name!r}")
