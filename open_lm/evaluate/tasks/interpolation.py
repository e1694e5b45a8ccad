"""`${…}` in a YAML: another key of the same file or an environment variable, as OmegaConf reads it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from open_lm.errors import ConfigError

REFERENCE = re.compile(r"\$\{([^${}]*)\}")
DEEPEST = 32


def resolved(values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """`values` with every `${key.key}`, `${list[0]}` and `${oc.env:NAME,otherwise}` replaced by what it names.

    A text that is nothing but one reference becomes what it names, of whatever type; else its text is put in.

    Raises:
        ConfigError: a reference names nothing, or itself; `origin` names the file.
    """
    return {str(key): _value(value, values, origin, 0) for key, value in values.items()}


def _value(value: Any, root: Mapping[str, Any], origin: str, depth: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _value(item, root, origin, depth) for key, item in value.items()}
    if isinstance(value, list):
        return [_value(item, root, origin, depth) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    if depth > DEEPEST:
        raise ConfigError(f"{origin}: {value!r} refers to itself. Break the circle.")
    whole = REFERENCE.fullmatch(value)
    if whole:
        return _value(_named(whole[1].strip(), root, origin), root, origin, depth + 1)
    text = REFERENCE.sub(lambda found: str(_value(found[0], root, origin, depth + 1)), value)
    if text == value:
        raise ConfigError(f"{origin}: {value!r}: cannot be read as a reference. Write ${{key.key}}.")
    return _value(text, root, origin, depth + 1)


def _named(name: str, root: Mapping[str, Any], origin: str) -> Any:
    """The value of a reference."""
    resolver, colon, argument = name.partition(":")
    if colon:
        return _from_environment(resolver, argument, origin)
    found: Any = root
    for part in re.findall(r"[^.\[\]]+", name):
        if isinstance(found, Mapping) and part in found:
            found = found[part]
        elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            raise ConfigError(f"{origin}: ${{{name}}}: there is no {part!r}. Define it in the file.")
    return found


def _from_environment(resolver: str, argument: str, origin: str) -> str:
    if resolver != "oc.env":
        raise ConfigError(f"{origin}: ${{{resolver}:…}}: this resolver is not known. There are keys and oc.env.")
    name, comma, otherwise = (part.strip() for part in argument.partition(","))
    if name not in os.environ and not comma:
        raise ConfigError(f"{origin}: ${{oc.env:{name}}}: this environment variable is not set. Set it.")
    return os.environ.get(name, otherwise)
