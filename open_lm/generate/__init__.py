"""Text from a model: `open_lm.generate(model, prompts)`."""

import sys
from types import ModuleType
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "generate":
        from open_lm.generate.decode import generate

        return generate
    raise AttributeError(f"module 'open_lm.generate' has no attribute {name!r}")


class _CallableModule(ModuleType):
    """Importing this package makes it the attribute `open_lm.generate`, where callers expect the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from open_lm.generate.decode import generate

        return generate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
