"""Data settings of an existing run, recovered from its folder."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from typing import Any

from open_lm import storage
from open_lm.data.config import DataConfig
from open_lm.data.mixture import BatchPositions, make_batch_positions
from open_lm.errors import ConfigError


def run_settings(run: str, step: int, global_batch: int | None = None) -> tuple[DataConfig, int, int, BatchPositions]:
    """The data flags of a run, its seed, the batch its order was planned for, and where the batch of `step` lies.

    These stand in the first checkpoint after `step`; where there is none, in the flags (`global_batch` completes them).

    Raises:
        ConfigError: the folder is no run, or its batch is not known yet.
    """
    params = _params(run)
    known: dict[str, Any] = {f.name: params[f.name] for f in fields(DataConfig) if f.name in params}
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
    config = _found(DataConfig(**known), run)
    states = sorted(_states(run), key=lambda state: state["steps"])
    later = [state for state in states if state["steps"] > step] or states[-1:]
    if later and global_batch is None:
        batch_positions = BatchPositions(
            later[0]["global_batch"],
            0,
            1,
            tuple((first, end) for first, end in later[0]["skips"]),
            first_step=later[0]["steps"],
            first_position=later[0]["samples_consumed"],
        )
        return config, later[0]["seed"], later[0]["planned_batch"], batch_positions
    global_batch = global_batch or (None if params.get("batch_size") else params["global_batch_size"])
    if global_batch is None:
        raise ConfigError(
            f"--run {storage.shown(run)}: was started with --batch-size per process and has no checkpoint yet. "
            "Give --global-batch-size: that number times its processes."
        )
    batch_positions = make_batch_positions(config, global_batch=global_batch, rank=0, world_size=1)
    return config, params["seed"], global_batch, batch_positions


def _found(config: DataConfig, run: str) -> DataConfig:
    """The flags with their paths as they are found from here: those of a run are relative to where it was started.

    Raises:
        ConfigError: a manifest is not there.
    """
    manifests = tuple(storage.found_near(url, run) for url in config.dataset_manifest)
    for named, url in zip(config.dataset_manifest, manifests, strict=True):
        if not storage.is_remote(url) and not storage.exists(url):
            raise ConfigError(
                f"--run {storage.shown(run)}: its --dataset-manifest {named} is not there, nor in a folder above the "
                "run. Start this in the folder that the run was started in."
            )
    return replace(config, dataset_manifest=manifests, train_data=tuple(_near(url, run) for url in config.train_data))


def _near(urls: str, run: str) -> str:
    """--train-data, several with :: between, as it is found from here."""
    return "::".join(storage.found_near(url, run) for url in urls.split("::"))


def _params(run: str) -> dict[str, Any]:
    import yaml

    path = storage.join(run, "params.txt")
    if not storage.exists(path):
        raise ConfigError(f"--run {storage.shown(run)}: holds no params.txt. Give the folder of a run: <logs>/<name>.")
    return yaml.safe_load(storage.read_text(path))


def _states(run: str) -> list[dict[str, Any]]:
    """The loader's state at each checkpoint."""
    import torch

    paths = storage.glob_in(storage.join(run, "checkpoints"), "stats_*.pt")
    found = []
    for path in paths:
        if os.path.exists(path):
            state = torch.load(path, weights_only=True, map_location="cpu").get("data_state")
            found += [state] if state else []
    return found
