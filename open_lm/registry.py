"""Registries: names mapped to the code that implements them, imported only when used."""

import importlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from open_lm.errors import ConfigError


class Registry(dict[str, str]):
    """A dict `name -> "package.module:attribute"`; its keys are the `choices` of a flag.

    Keeping the place of the code, not the code, lets `--help` list every variant without importing torch.
    """

    def __init__(self, kind: str, entries: Mapping[str, str]):
        super().__init__(entries)
        self.kind = kind

    def load(self, name: str) -> Any:
        """The class or function registered as `name`.

        Raises:
            ConfigError: nothing has that name.
        """
        if name not in self:
            raise ConfigError(f"unknown {self.kind} {name!r}: choose one of {', '.join(self)}.")
        module, attribute = self[name].split(":")
        return getattr(importlib.import_module(module), attribute)


def late_names(module: str, home: str, names: Collection[str]) -> Callable[[str], Any]:
    """A module's `__getattr__`: `names` are imported from `home` when first asked for."""

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return getattr(importlib.import_module(home), name)

    return get
