"""Flags that belong to some tasks only: given to another, they would change nothing, and are refused."""

from __future__ import annotations

import dataclasses
from typing import Any

from open_lm.errors import ConfigError
from open_lm.post_training.config import PREFERENCE_LOSSES, WITHOUT_REFERENCE

PER_TOKEN = ("pretrain", "sft")
RL = ("grpo", "rloo", "ppo")
PREFERENCES = (*PREFERENCE_LOSSES, "kto")
COMPARED = tuple(name for name in PREFERENCES if name not in WITHOUT_REFERENCE)
WITH_DATA = (*PER_TOKEN, *PREFERENCES, "reward")

OWNERS: dict[str, dict[str, tuple[str, ...]]] = {
    "task": {"neftune_alpha": ("sft",)},
    "train": {"z_loss_coefficient": PER_TOKEN},
    "distillation": {"distill_pretrained": PER_TOKEN},
    "data": {"train_data": WITH_DATA, "dataset_manifest": WITH_DATA},
    "preferences": {
        "beta": PREFERENCES,
        "label_smoothing": ("cdpo", "robust"),
        "simpo_gamma": ("simpo",),
        "desirable_weight": ("kto",),
        "undesirable_weight": ("kto",),
        "reference": (*COMPARED, *RL),
        "reference_log_probs": COMPARED,
        "reward_centring": ("reward",),
    },
    "rl": {
        "advantage_std": ("grpo",),
        "rl_loss_mean": ("grpo", "ppo"),
        **dict.fromkeys(("gae_gamma", "gae_lambda", "value_coefficient", "value_clip"), ("ppo",)),
    },
}
"""Group of flags -> flag -> the tasks that look at it; of `rl`, all that are not named belong to all of RL."""


def check_task_flags(config: Any) -> None:
    """Refuse flags that --task does not look at; `config` has one field per group of flags. A task of one's own may.

    Raises:
        ConfigError: such a flag is given another value than its own.
    """
    task = config.task.task
    if task not in WITH_DATA + RL:
        return
    for group, name, value in _given(config):
        owners = OWNERS.get(group, {}).get(name, RL if group == "rl" else WITH_DATA + RL)
        if task not in owners:
            raise ConfigError(
                f"--{name.replace('_', '-')} belongs to --task {', '.join(owners)}; --task {task} would not look at "
                f"{_shown(value)}. Leave it out."
            )
    if task in RL and not config.rl.kl_coefficient:
        _refuse_unused_reference(config)


def _given(config: Any) -> list[tuple[str, str, Any]]:
    """The flags of the groups above that are not at their defaults: group, name, value."""
    found = []
    for group in OWNERS:
        values = getattr(config, group)
        defaults = {field.name: field.default for field in dataclasses.fields(values)}
        found += [(group, name, value) for name, value in vars(values).items() if value != defaults.get(name, value)]
    return found


def _refuse_unused_reference(config: Any) -> None:
    if config.preferences.reference:
        raise ConfigError("--reference is asked for --kl-coefficient alone: give that too, or leave it out.")
    if config.rl.kl_in != "loss":
        raise ConfigError(f"--kl-in says where --kl-coefficient counts: give that too, or leave out {config.rl.kl_in}.")


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
