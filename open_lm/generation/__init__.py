"""Text generation: `open_lm.generate(model, prompts)` and what it is made of."""

from typing import Any

__all__ = ["generate"]


def __getattr__(name: str) -> Any:
    if name == "generate":
        from open_lm.generation.decode import generate

        return generate
    raise AttributeError(f"module 'open_lm.generation' has no attribute {name!r}")
