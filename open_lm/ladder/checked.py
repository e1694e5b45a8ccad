"""Values of a ladder file, each of the type that its key takes."""

from __future__ import annotations

import difflib
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from open_lm.errors import ConfigError

TYPE_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object"}


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object in `text`.

    Raises:
        ValueError: it is no JSON, no object, or a key stands twice in an object.
    """
    loaded = json.loads(text, object_pairs_hook=_unique)
    if not isinstance(loaded, dict):
        raise ValueError(f"holds a {type(loaded).__name__}, not an object of keys")
    return loaded


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} stands twice in one object: the first would be lost")
        found[key] = value
    return found


def known_keys(place: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse a key that is not among `known`; `place` begins the name of each, such as "run.".

    Raises:
        ConfigError: naming the nearest known key.
    """
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f": did you mean {close[0]}?" if close else f". There are {', '.join(known)}."
            raise ConfigError(f"{place}{key} in the ladder file: no such key{hint}")


def checked(key: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` says: lists become tuples, whole numbers pass for numbers.

    Raises:
        ConfigError: it is of another type, or a number that is not finite.
    """
    options = _options(hint)
    if value is None and type(None) in options:
        return None
    (hint,) = [option for option in options if option is not type(None)]
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key} in the ladder file: found {_shown(value)}, need a list.")
        return tuple(checked(f"{key}[{k}]", item, typing.get_args(hint)[0]) for k, item in enumerate(value))
    kind = typing.get_origin(hint) or hint
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{key} in the ladder file: found {_shown(value)}, need {TYPE_WORDS[kind]}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} in the ladder file: found {value}, need a finite number.")
    return value


def whole(key: str, value: Any, least: int) -> int:
    """`value` as a whole number of at least `least`.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{key} in the ladder file: found {_shown(value)}, need a whole number from {least} on.")
    return value


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _shown(value: Any) -> str:
    return json.dumps(value, default=repr)
