"""The ladder file: sizes, devices, data and rules of one ladder, read from ladder.json and checked."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from open_lm import storage
from open_lm.errors import ConfigError
from open_lm.ladder.run_configurator import CONFIGURATORS, RunConfigurator
from open_lm.ladder.sizes import COUNTINGS, ModelConfigurator, SizeSpec

OWN_FLAGS = {
    "model", "dataset_manifest", "train_data_mix_weights", "val_data", "icl_tasks", "tokenizer", "global_batch_size",
    "batch_size", "accum_freq", "train_tokens", "train_steps", "train_num_samples", "epochs", "num_checkpoints", "lr",
    "warmup", "warmup_tokens", "lr_scheduler", "lr_decay_fraction", "lr_decay_tokens", "lr_period_tokens", "lr_read_at",
    "lr_cooldown_end", "beta1", "beta2", "wd", "wd_rule", "wd_all", "grad_clip_norm", "z_loss_coefficient", "seed",
    "save_at_steps", "eval_at_steps", "keep_last", "delete_previous_checkpoint", "resume", "logs", "logs_dir", "name",
    "stop_at_step", "stop_at_tokens", "dry_run", "remote_sync", "config",
}  # fmt: skip
"""Flags of training that the ladder sets itself."""


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
    """Where the ladder file lies."""

    def __post_init__(self) -> None:
        for key in ("sequence_length", "vocab_size", "max_devices"):
            _require_int(key, getattr(self, key), 1)
        _require_int("seed", self.seed, 0)
        if self.rank_microbatch_tokens is not None:
            _require_int("rank_microbatch_tokens", self.rank_microbatch_tokens, 1)
        if not self.name or "/" in self.name:
            raise ConfigError(f"name {self.name!r} in the ladder file must be one path component.")
        if self.counting not in COUNTINGS:
            raise ConfigError(f"counting {self.counting!r} in the ladder file: choose of {', '.join(COUNTINGS)}.")
        if not self.sizes:
            raise ConfigError("sizes in the ladder file: found none. Name at least one, such as 190M.")
        for name in self.sizes:
            if name in ("", ".", "..") or "/" in name:
                raise ConfigError(f"sizes.{name} in the ladder file: a size's name is one path component.")
        for key in self.flags:
            if key.replace("-", "_") in OWN_FLAGS:
                raise ConfigError(f"flags.{key} in the ladder file: the ladder sets --{key} itself. Leave it out.")

    def path(self, name: str) -> str:
        """`name` as it stands in the file, from the folder of the ladder file; urls and absolute paths as they are."""
        if storage.is_remote(name):
            return name
        return os.path.normpath(os.path.join(self.folder, os.path.expanduser(name)))

    @property
    def root(self) -> str:
        """The folder or url that holds a folder for each size."""
        return self.path(self.dir)

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
        known = [f.name for f in fields(rule)]
        for key, value in values.items():
            if key not in known:
                raise ConfigError(f"run.{key} in the ladder file: no such key{_near(key, known)}")
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"run.{key} in the ladder file: found {value!r}, need a number.")
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
        values = json.loads(storage.read_text(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--ladder {path}: not readable as JSON ({error}).") from error
    except Exception as error:
        raise ConfigError(f"--ladder {path}: {error} Make one with `openlm ladder init`.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--ladder {path}: holds a {type(values).__name__}, not the keys of a ladder.")
    return from_dict(values, storage.parent(path))


def from_dict(values: Mapping[str, Any], folder: str) -> LadderConfig:
    """The ladder that the keys of a ladder file describe.

    Raises:
        ConfigError: a key is missing, unknown or out of range.
    """
    known = {f.name: f for f in fields(LadderConfig) if f.name != "folder"}
    for key in values:
        if key not in known:
            raise ConfigError(f"{key} in the ladder file: no such key{_near(key, list(known))}")
    required = [name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise ConfigError(f"{missing[0]} is missing in the ladder file.")
    given = dict(values)
    sizes = given["sizes"]
    given["sizes"] = dict.fromkeys(sizes) if isinstance(sizes, list) else sizes
    given["data"] = _sources(given["data"])
    given["val_data"] = tuple(_list("val_data", given.get("val_data", [])))
    for key in ("sizes", "model", "run", "flags"):
        if not isinstance(given.get(key, {}), dict):
            raise ConfigError(f"{key} in the ladder file: found {given[key]!r}, need an object.")
    return LadderConfig(**given, folder=folder or ".")


def _sources(value: Any) -> DataSources:
    """Manifests as a list, or as an object with weights."""
    value = {"manifests": value} if isinstance(value, list) else value
    if not isinstance(value, dict) or set(value) - {"manifests", "weights"} or not value.get("manifests"):
        raise ConfigError(
            'data in the ladder file: give {"manifests": [...], "weights": [...]} (weights may be left out), '
            f"found {value!r}."
        )
    manifests = tuple(_list("data.manifests", value["manifests"]))
    weights = tuple(_list("data.weights", value.get("weights") or []))
    if weights and len(weights) != len(manifests):
        raise ConfigError(f"data in the ladder file: {len(weights)} weights for {len(manifests)} manifests.")
    return DataSources(manifests, weights)


def _list(key: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError(f"{key} in the ladder file: found {value!r}, need a list.")
    return value


def _require_int(key: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{key} in the ladder file: found {value!r}, need a whole number from {least} on.")


def _near(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f": did you mean {close[0]}?" if close else f". There are {', '.join(known)}."
