"""Flags of training that a ladder sets itself: the rule of the ladder decides them, so its file may not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from open_lm.errors import ConfigError
from open_lm.model.config import ModelFlags
from open_lm.train.config import ScheduleConfig, TrainConfig

_MODEL = {f.name for f in fields(ModelFlags)}
_LENGTH = {f.name for f in fields(TrainConfig)} - {"time_limit_minutes"}
_SCHEDULE = {f.name for f in fields(ScheduleConfig)}
_OTHERS = {
    "train_data", "dataset_manifest", "train_data_mix_weights", "train_data_upsampling_factors", "tokenizer",
    "val_data", "val_checkpoints", "eval_at_steps", "icl_tasks", "beta1", "beta2", "wd", "wd_rule", "wd_all",
    "grad_clip_norm", "device", "preset_world_size", "save_at_steps", "keep_last", "delete_previous_checkpoint",
    "resume", "remote_sync", "name", "logs", "logs_dir", "dry_run", "config",
}  # fmt: skip
OWN_FLAGS = frozenset(_MODEL | _LENGTH | _SCHEDULE | _OTHERS)


def plain_name(flag: str) -> str:
    """A flag's name as configs spell it: `--lr-scheduler`, `lr-scheduler` and `lr_scheduler` are one."""
    return flag.lstrip("-").replace("-", "_")


def refuse_own(given: Mapping[str, Any]) -> None:
    """Refuse flags of the ladder file that the ladder sets itself, by name.

    Raises:
        ConfigError: naming the flag, and the key of the ladder file to use.
    """
    for key in given:
        name = plain_name(key)
        if name in _MODEL:
            raise ConfigError(
                f"flags.{key} in the ladder file: an architecture's keys stand under model, or in a size."
            )
        if name in OWN_FLAGS:
            raise ConfigError(
                f"flags.{key} in the ladder file: the ladder sets --{name.replace('_', '-')} itself. Leave it out; "
                "what can be changed stands under run, data, seed and device_type."
            )


def refuse_changed(set_here: Mapping[str, Any], with_given: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse flags under another spelling (an alias, an abbreviation): the parsed values show what they change.

    Raises:
        ConfigError: a value that the ladder sets differs.
    """
    for name in sorted(OWN_FLAGS & set(set_here)):
        if set_here[name] != with_given[name]:
            raise ConfigError(
                f"flags in the ladder file ({', '.join(given)}): they change --{name.replace('_', '-')} from "
                f"{set_here[name]!r} to {with_given[name]!r}, which the ladder sets itself. Leave that out."
            )
