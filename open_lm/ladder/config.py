"""The ladder file: sizes, devices, data and rules of one ladder, read from ladder.json and checked."""

from __future__ import annotations

import os
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from open_lm import storage
from open_lm.errors import ConfigError, OpenLMError
from open_lm.ladder.checked import checked, known_keys, parse_object, whole
from open_lm.ladder.owned import plain_name, refuse_own
from open_lm.ladder.run_configurator import CONFIGURATORS, RunConfigurator
from open_lm.ladder.sizes import COUNTINGS, ModelConfigurator, SizeSpec


@dataclass(frozen=True)
class DataSources:
    """Training data: manifests, and the weight of each in the mixture."""

    manifests: tuple[str, ...]
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class LadderConfig:
    """Everything a ladder file says; paths in it are relative to the file's folder."""

    name: str
    dir: str
    sizes: dict[str, dict[str, Any] | None]
    sequence_length: int
    vocab_size: int
    data: DataSources
    project: str | None = None
    max_devices: int = 1
    device_type: str = "any"
    tokenizer: str | None = None
    seed: int = 0
    counting: str = "non-embedding"
    rank_microbatch_tokens: int | None = None
    model: dict[str, Any] = field(default_factory=dict)
    val_data: tuple[str, ...] = ()
    icl_tasks: str | None = None
    run: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    folder: str = "."
    """The folder of the ladder file."""

    def __post_init__(self) -> None:
        for key in ("sequence_length", "vocab_size", "max_devices"):
            whole(key, getattr(self, key), 1)
        whole("seed", self.seed, 0)
        if self.rank_microbatch_tokens is not None:
            whole("rank_microbatch_tokens", self.rank_microbatch_tokens, 1)
        if not self.name or "/" in self.name:
            raise ConfigError(f"name {self.name!r} in the ladder file must be one path component.")
        if self.counting not in COUNTINGS:
            raise ConfigError(f"counting {self.counting!r} in the ladder file: choose of {', '.join(COUNTINGS)}.")
        if not self.sizes:
            raise ConfigError("sizes in the ladder file: found none. Name at least one, such as 190M.")
        for name in self.sizes:
            if name in ("", ".", "..") or "/" in name:
                raise ConfigError(f"sizes.{name} in the ladder file: a size's name is one path component.")
        refuse_own(self.flags)

    def path(self, name: str) -> str:
        """`name` as it stands in the file, from the folder of the ladder file; urls and absolute paths as they are."""
        if storage.is_remote(name):
            return name
        if storage.is_remote(self.folder):
            return storage.join(self.folder, name) if not os.path.isabs(name) else name
        return os.path.normpath(os.path.join(self.folder, os.path.expanduser(name)))

    @property
    def root(self) -> str:
        """The folder or url that holds a folder for each size."""
        return self.path(self.dir)

    @property
    def reports_to_wandb(self) -> bool:
        """Whether its flags of training ask for Weights & Biases, by either name or by `all`."""
        asked = next((value for key, value in self.flags.items() if plain_name(key) == "report_to"), "")
        return bool({"wandb", "all"} & {word.strip() for word in str(asked).split(",")})

    def configurator(self) -> RunConfigurator:
        """The rule for the numbers of runs.

        Raises:
            ConfigError: no such rule, or parameters it does not take.
        """
        values = dict(self.run)
        name = values.pop("configurator", "wsds-chinchilla")
        if name not in CONFIGURATORS:
            raise ConfigError(f"run.configurator {name!r} in the ladder file: choose of {', '.join(CONFIGURATORS)}.")
        rule = CONFIGURATORS[name]
        known_keys("run.", values, [f.name for f in fields(rule)])
        for key, value in values.items():
            checked(f"run.{key}", value, float)
        made: RunConfigurator = rule(**values)
        return made

    def models(self) -> ModelConfigurator:
        """The rule for architectures."""
        return ModelConfigurator(
            self.sequence_length,
            self.vocab_size,
            device_type=self.device_type,
            rank_microbatch_tokens=self.rank_microbatch_tokens,
            model=self.model,
        )

    def size(self, name: str) -> SizeSpec:
        """The size `name`.

        Raises:
            ConfigError: the ladder has no such size.
        """
        if name not in self.sizes:
            raise ConfigError(f"--size {name}: the ladder has {', '.join(self.sizes)}.")
        values = dict(self.sizes[name] or {})
        if str(values.get("model", "")).endswith(".json"):
            values["model"] = self.path(values["model"])
        return self.models().size(name, values)


def read_ladder(path: str) -> LadderConfig:
    """The ladder file at `path`.

    Raises:
        ConfigError: it is missing, not JSON, or a key is missing, unknown or out of range.
    """
    try:
        content = storage.read_text(path)
    except (OSError, OpenLMError) as error:
        raise ConfigError(f"--ladder {path}: {error} Make one with `openlm ladder init`.") from error
    try:
        values = parse_object(content)
    except ValueError as error:
        raise ConfigError(f"--ladder {path}: not readable as a JSON object ({error}).") from error
    return from_dict(values, storage.parent(path))


def from_dict(values: Mapping[str, Any], folder: str) -> LadderConfig:
    """The ladder that the keys of a ladder file describe.

    Raises:
        ConfigError: a key is missing, unknown or out of range.
    """
    known = {f.name: f for f in fields(LadderConfig) if f.name != "folder"}
    known_keys("", values, list(known))
    required = [name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise ConfigError(f"{missing[0]} is missing in the ladder file.")
    hints = typing.get_type_hints(LadderConfig)
    given: dict[str, Any] = {"sizes": _sizes(values["sizes"]), "data": _sources(values["data"])}
    given |= {key: checked(key, value, hints[key]) for key, value in values.items() if key not in given}
    return LadderConfig(**given, folder=folder or ".")


def _sizes(value: Any) -> dict[str, dict[str, Any] | None]:
    """Sizes as a list of names, or as an object with what makes each."""
    if isinstance(value, list):
        names = checked("sizes", value, tuple[str, ...])
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"sizes in the ladder file: {twice} stands twice.")
        return dict.fromkeys(names)
    given: dict[str, Any] = checked("sizes", value, dict)
    return {name: checked(f"sizes.{name}", keys, dict | None) for name, keys in given.items()}


def _sources(value: Any) -> DataSources:
    """Manifests as a list, or as an object with weights."""
    value = {"manifests": value} if isinstance(value, list) else value
    if not isinstance(value, dict) or set(value) - {"manifests", "weights"} or not value.get("manifests"):
        raise ConfigError(
            'data in the ladder file: give {"manifests": [...], "weights": [...]} (weights may be left out), '
            f"found {value!r}."
        )
    manifests = checked("data.manifests", value["manifests"], tuple[str, ...])
    weights = checked("data.weights", value.get("weights") or [], tuple[float, ...])
    if weights and len(weights) != len(manifests):
        raise ConfigError(f"data in the ladder file: {len(weights)} weights for {len(manifests)} manifests.")
    if any(weight < 0 for weight in weights) or (weights and not any(weights)):
        raise ConfigError(f"data.weights in the ladder file: found {list(weights)}, need shares from 0 on, not all 0.")
    return DataSources(manifests, weights)
