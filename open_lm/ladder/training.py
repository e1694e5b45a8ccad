"""Training of one size: the flags that follow from its plan, checked, and the command that repeats it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from open_lm import storage
from open_lm.errors import ConfigError
from open_lm.ladder.config import LadderConfig
from open_lm.ladder.owned import plain_name, refuse_changed
from open_lm.ladder.plan import SizePlan
from open_lm.params import RunConfig, parse_args, read_config
from open_lm.train.config import mesh_shape

EPHEMERAL_SAVES = 20
"""Parts of a run after each of which its state is saved, so that a kill costs at most one of them."""
REPORTS = 50
"""Reports of a run; of its shortest decay where only the training loss is measured, whose end is what counts."""
_PLACES_WEIGHTS = ("mesh", "fsdp", "fsdp_hybrid", "fsdp_hybrid_o2")


def train_flags(plan: SizePlan, model_path: str, logs: str, name: str, **own: Any) -> dict[str, Any]:
    """Flags of `open_lm.main` for the run of `plan`; `own` replaces or adds some, None takes one away."""
    numbers, batch, config = plan.numbers, plan.batch, plan.config
    reported = plan.steps if config.val_data else min(map(plan.decay_steps, numbers.periods))
    steps = ",".join(map(str, plan.checkpoint_steps))
    flags: dict[str, Any] = {
        "model": model_path,
        "dataset_manifest": [config.path(name) for name in config.data.manifests],
        "train_data_mix_weights": list(config.data.weights) or None,
        "tokenizer": _tokenizer(config),
        "global_batch_size": batch.tokens // config.sequence_length,
        "accum_freq": batch.accumulation,
        "train_tokens": numbers.total_tokens,
        "num_checkpoints": 1,
        "lr": numbers.peak_lr,
        "warmup_tokens": numbers.warmup_tokens,
        "lr_scheduler": "wsd-s",
        "lr_read_at": "end",
        "lr_decay_fraction": numbers.decay_fraction,
        "lr_period_tokens": [period.tokens for period in numbers.periods],
        "lr_cooldown_end": 0.0,
        "beta1": numbers.beta1,
        "beta2": numbers.beta2,
        "wd": numbers.weight_decay,
        "wd_rule": "all-but-embedding",
        "grad_clip_norm": numbers.grad_clip_norm,
        "z_loss_coefficient": numbers.z_loss,
        "seed": config.seed,
        "val_data": [config.path(name) for name in config.val_data] or None,
        "icl_tasks": config.path(config.icl_tasks) if config.icl_tasks else None,
        "icl_frequency": 0 if config.icl_tasks else None,
        "eval_at_steps": steps if config.val_data or config.icl_tasks else None,
        "save_at_steps": steps,
        "ephemeral_every_steps": max(1, plan.steps // EPHEMERAL_SAVES),
        "log_every_n_steps": max(1, min(100, reported // REPORTS)),
        "device": "cpu" if config.device_type.lower() == "cpu" else None,
        "wandb_project_name": config.project,
        "logs_dir": logs,
        "name": name,
        "resume": "latest",
        "remote_sync": config.root if storage.is_remote(config.root) else None,
    }
    given = {plain_name(key): value for key, value in config.flags.items()}
    if plan.size.mesh.world_size > 1 and not set(_PLACES_WEIGHTS) & set(given):
        flags["fsdp"] = True  # the size asks for more than one device: one does not hold it
    return flags | given | own


def training_config(plan: SizePlan, flags: Mapping[str, Any]) -> RunConfig:
    """The configuration that the trainer reads from `flags`.

    Raises:
        ConfigError: a flag is unknown or wrong, changes what the ladder sets, or its mesh does not fit the plan.
    """
    given, values = plan.config.flags, dict(flags)
    try:
        config = read_config(parse_args(as_argv(values)))
    except ConfigError as error:
        raise ConfigError(f"size {plan.name}, its flags of training: {error}") from error
    if given:
        without = {key: value for key, value in values.items() if key not in set(map(plain_name, given))}
        refuse_changed(read_config(parse_args(as_argv(without))).as_flags(), config.as_flags(), given)
    ranks, shape = plan.batch.devices, mesh_shape(config.parallel, plan.batch.devices)
    if shape.n_data != plan.batch.dp_world_size:
        raise ConfigError(
            f"size {plan.name}: {plan.batch.dp_world_size} of its {ranks} devices are data-parallel by min_devices and "
            f"min_dp, but {shape.n_data} by the flags (mesh {shape}). Give flags.mesh, such as "
            f'"tp={max(1, ranks // plan.batch.dp_world_size)}", or change min_dp.'
        )
    return config


def as_argv(flags: Mapping[str, Any]) -> list[str]:
    """Flags as a command line; None leaves one out, true and false become --flag and --no-flag.

    Raises:
        ConfigError: a value is no text, number, truth value or list of those.
    """
    argv: list[str] = []
    for name, value in flags.items():
        spelled = "--" + name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            argv.append(spelled if value else f"--no-{spelled[2:]}")
        elif isinstance(value, list | tuple):
            argv += [spelled, *map(_word, value)]
        elif isinstance(value, str | int | float):
            argv += [spelled, _word(value)]
        else:
            raise ConfigError(f"flags.{name} in the ladder file: found {value!r}, need text, a number, true or a list.")
    return argv


def command_of(plan: SizePlan, argv: list[str]) -> list[str]:
    """The command that starts the trainer on the devices of the plan."""
    if plan.batch.devices == 1:
        return [sys.executable, "-m", "open_lm.main", *argv]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={plan.batch.devices}", "-m", "open_lm.main", *argv]


def require_devices(plan: SizePlan, command: Sequence[str]) -> None:
    """Refuse a size that this machine has too few GPUs for, with the command that starts it on several nodes.

    Raises:
        ConfigError: it has fewer than the plan uses, or none although the ladder file names a kind of GPU.
    """
    import torch

    kind, n_here = plan.config.device_type.lower(), torch.cuda.device_count()
    if kind == "cpu" or (kind == "any" and not n_here):
        return
    if not n_here:
        raise ConfigError(
            f'device_type {plan.config.device_type} in the ladder file: this machine has no GPU. Give "cpu", or "any".'
        )
    if n_here < plan.batch.devices:
        n_nodes = -(-plan.batch.devices // n_here)
        nodes = [f"--nnodes={n_nodes}", "--rdzv-backend=c10d", "--rdzv-endpoint=FIRST_NODE:29500"]
        words = [*command[:3], *nodes, f"--nproc-per-node={plan.batch.devices // n_nodes}", *command[5:]]
        raise ConfigError(
            f"size {plan.name} trains on {plan.batch.devices} devices, this machine has {n_here}. Lower max_devices in "
            f"the ladder file, or start this on each of {n_nodes} nodes that share the folder:\n  {shlex.join(words)}\n"
            "and afterwards `openlm ladder run` again, which writes the metrics."
        )


def _word(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def _tokenizer(config: LadderConfig) -> str | None:
    """A tokenizer file beside the ladder file by its path, a name of the Hub as it is."""
    name = config.tokenizer
    if name is None:
        return None
    return config.path(name) if storage.exists(config.path(name)) else name
