"""Flags from frozen dataclasses: one argparse group each, parsed back into the dataclass."""

import difflib
import importlib
import math
import sys
import types
import typing
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from open_lm.errors import ConfigError

C = TypeVar("C")


def flag(
    default: Any,
    help: str,
    *,
    choices: Iterable[str] | None = None,
    aliases: Sequence[str] = (),
    metavar: str | None = None,
    least: float | None = None,
    above: float | None = None,
    repeatable: bool = False,
) -> Any:
    """Declare one flag; `help` is its only documentation and names the unit and what special values mean.

    A registry as `choices` may still grow until the flags are parsed. `aliases` are further spellings, written as on
    the command line (`"--input-glob"`); numbers must be at `least` that, or `above` that. A `repeatable` flag of
    several values adds to them when it is given again.
    """
    metadata: dict[str, Any] = {
        "help": help,
        "choices": choices if isinstance(choices, dict) else tuple(choices) if choices else None,
        "aliases": aliases,
        "metavar": metavar,
    }
    metadata |= {"least": least, "above": above, "repeatable": repeatable}
    return field(default=default, metadata=metadata)


class Parser(ArgumentParser):
    """An ArgumentParser that raises `ConfigError`, and names the nearest known flag for an unknown one.

    Under `openlm COMMAND` it calls itself that, unless `prog` says more (`openlm ladder fit`).
    """

    def __init__(self, **kwargs: Any):
        if sys.argv[0].startswith("openlm ") and not kwargs.get("prog", "").startswith(sys.argv[0]):
            kwargs["prog"] = sys.argv[0]
        super().__init__(formatter_class=RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See {self.prog} --help.")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Namespace | None = None) -> Namespace:  # type: ignore[override]
        words = [self._with_dashes(word) for word in (sys.argv[1:] if args is None else args)]
        parsed, unknown = self.parse_known_args(words, namespace)
        if unknown:
            self.error(f"unknown {unknown[0]!r}{self._nearest(unknown[0])}")
        return parsed

    def _with_dashes(self, word: str) -> str:
        """`--wandb_project_name` as `--wandb-project-name`: OpenLM's commands are written with either."""
        name, equals, value = word.partition("=")
        dashed = name.replace("_", "-")
        known = self._option_string_actions
        return dashed + equals + value if name.startswith("--") and name not in known and dashed in known else word

    def _nearest(self, spelled: str) -> str:
        if not spelled.startswith("-"):
            return ": a value without a flag before it"
        known = [option for option in self._option_string_actions if option.startswith("--")]
        close = difflib.get_close_matches(spelled.split("=")[0].replace("_", "-"), known, n=1, cutoff=0.6)
        return f": did you mean {close[0]}?" if close else ""


def add_group(parser: ArgumentParser, config: type, *, separator: str = "-") -> None:
    """Add one titled group of flags, one per field of `config`; the title is the first line of its docstring.

    `separator="_"` spells the flags with underscores (and accepts dashes), as the Ray tool always did.
    """
    group, hints = parser.add_argument_group((config.__doc__ or "").splitlines()[0]), typing.get_type_hints(config)
    for f in fields(config):
        if "help" not in f.metadata:
            continue
        kind, many = value_type(hints[f.name])
        names = _spellings(f.name, separator, f.metadata["aliases"])
        text = f.metadata["help"].replace("%", "%%")
        default = f.default if f.default is not MISSING else SUPPRESS
        if kind is bool:
            group.add_argument(*names, action=BooleanOptionalAction, default=default, help=text)
            continue
        shown = "" if default in (None, (), "") else " (default: %(default)s)"
        group.add_argument(
            *names,
            action="extend" if f.metadata["repeatable"] else "store",
            type=kind,
            default=list(default) if f.metadata["repeatable"] else default,
            nargs="+" if many else None,
            choices=tuple(f.metadata["choices"]) if f.metadata["choices"] else None,
            metavar=f.metadata["metavar"] or (None if f.metadata["choices"] else kind.__name__.upper()),
            help=text + shown,
        )


def _spellings(name: str, separator: str, aliases: Sequence[str]) -> list[str]:
    spelled = "--" + name.replace("_", separator)
    also = ["--" + name.replace("_", "-")] if separator == "_" and "_" in name else []
    return [spelled, *also, *aliases]


def value_type(hint: Any) -> tuple[type, bool]:
    """The type of one value of a flag, and whether the flag takes several.

    `int | None` is (int, False); `tuple[float, ...]` is (float, True).
    """
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = [option for option in typing.get_args(hint) if option is not type(None)]
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def read_group(args: Namespace, config: type[C]) -> C:
    """Build `config` from parsed flags; its `__post_init__` checks the values."""
    values = {}
    for f in fields(config):  # type: ignore[arg-type]
        if "help" in f.metadata:
            values[f.name] = getattr(args, f.name)
            for value in values[f.name] if isinstance(values[f.name], list) else [values[f.name]]:
                _check_range(f.name, value, f.metadata["least"], f.metadata["above"])
    return config(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def _check_range(name: str, value: Any, least: float | None, above: float | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    spelled = "--" + name.replace("_", "-")
    if not math.isfinite(value):
        raise ConfigError(f"{spelled} {value} must be finite.")
    if least is not None and value < least:
        raise ConfigError(f"{spelled} {value} must be at least {least}.")
    if above is not None and value <= above:
        raise ConfigError(f"{spelled} {value} must be above {above}.")


def as_flags(config: Any) -> dict[str, Any]:
    """The flags of one group as plain `name: value` pairs, tuples as lists: what `params.txt` and checkpoints keep."""
    plain = {f.name: getattr(config, f.name) for f in fields(config) if "help" in f.metadata}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in plain.items()}


def read_config_file(path: str) -> dict[str, Any]:
    """The `flag: value` pairs of a YAML or JSON file, dashes or underscores alike.

    Raises:
        ConfigError: the file is missing, does not parse, or is not one mapping.
    """
    import yaml

    try:
        loaded = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {error}. Give a readable YAML or JSON file of flags.") from error
    if not isinstance(loaded, Mapping):
        found = type(loaded).__name__
        raise ConfigError(f"--config {path}: holds a {found}, not `flag: value` pairs. Write one flag a line.")
    values: dict[str, Any] = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name in values:
            raise ConfigError(f"--config {path}: {name} is given twice. Keep one.")
        values[name] = value
    return values


def set_defaults_from(parser: ArgumentParser, values: Mapping[str, Any], origin: str) -> None:
    """Make `values` the defaults of `parser`, each checked as if it had been typed on the command line.

    Raises:
        ConfigError: a key is no flag, or a value has the wrong type or is not among the flag's choices.
    """
    actions = {action.dest: action for action in parser._actions}
    for name, value in values.items():
        if name not in actions or name in ("help", "config"):
            close = difflib.get_close_matches(name, actions, n=1)
            hint = f": did you mean {close[0]}?" if close else "."
            raise ConfigError(f"{origin}: unknown flag {name!r}{hint}")
        parser.set_defaults(**{name: _checked(actions[name], value, f"{origin}: {name}")})


def _checked(action: Any, value: Any, origin: str) -> Any:
    if value is None:
        if action.default is not None:
            raise ConfigError(f"{origin}: found nothing (null). Give a value, or leave the line out.")
        return None
    if isinstance(action, BooleanOptionalAction):
        if not isinstance(value, bool):
            raise ConfigError(f"{origin}: found {value!r}, need true or false.")
        return value
    if action.nargs == "+":
        items = value if isinstance(value, list) else [value]
        return [_checked_one(action, item, origin) for item in items]
    return _checked_one(action, value, origin)


def _checked_one(action: Any, value: Any, origin: str) -> Any:
    if isinstance(value, bool | list | dict):
        raise ConfigError(f"{origin}: found {value!r}, need one {action.type.__name__}.")
    try:
        converted = action.type(value if isinstance(value, str) else str(value))
    except ValueError as error:
        raise ConfigError(f"{origin}: found {value!r}, need one {action.type.__name__}.") from error
    if action.choices and converted not in action.choices:
        raise ConfigError(f"{origin}: found {value!r}, choose one of {', '.join(map(str, action.choices))}.")
    return converted


def parse_steps(words: Iterable[str], spelled: str, *, least: int = 1) -> frozenset[int]:
    """Steps that a flag names: numbers from `least` on and ranges (`5-7` is 5, 6, 7), with commas or spaces between.

    Raises:
        ConfigError: a word is neither; `spelled` is the flag it came from.
    """
    numbers: set[int] = set()
    for word in (word.strip() for part in words for word in part.split(",") if word.strip()):
        first, dash, last = word.partition("-")
        if not (first.isdigit() and (last.isdigit() if dash else True)) or not least <= int(first) <= int(
            last or first
        ):
            raise ConfigError(f"{spelled} {word}: give steps, counted from {least}, such as 5, or ranges such as 5-7.")
        numbers |= set(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


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
