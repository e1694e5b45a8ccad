"""Run folder: `<logs>/<name>/` with params.txt, out.log and checkpoints/."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import yaml

from open_lm import storage
from open_lm.checkpoint.commit import Commit, committed
from open_lm.checkpoint.fetch import bring_back_logs
from open_lm.checkpoint.retention import labels_in
from open_lm.distributed import World
from open_lm.errors import ConfigError
from open_lm.model.config import ModelConfig
from open_lm.params import RunConfig
from open_lm.run.lock import FolderLock


def open_folder(config: RunConfig, world: World, architecture: ModelConfig, lock: FolderLock) -> str:
    """Make the run's folder on rank 0, take its `lock` if the run trains, and write params.txt into it; every rank gets
    its path, or the same error.

    Raises:
        ConfigError: the folder, or its remote copy, holds a run and --resume is not given.
        FolderLocked: another run works in it.
        StorageError: the folder cannot be written.
    """
    return world.on_rank0(lambda: _open(config, openlm_facts(config, world, architecture), lock))


def openlm_facts(config: RunConfig, world: World, architecture: ModelConfig) -> dict[str, Any]:
    """Keys of params.txt that OpenLM's and DCLM's scripts look for and no flag here is called."""
    train, validation, n = config.train, config.validation, world.size
    per_gpu = train.batch_size or max(1, train.global_batch_size // n)
    total = validation.global_val_batch_size
    per_gpu_val = validation.val_batch_size or (max(1, total // n) if total else per_gpu)
    return {
        "seq_len": architecture.seq_len,
        "vocab_size": architecture.vocab_size,
        "per_gpu_batch_size": per_gpu,
        "per_gpu_val_batch_size": per_gpu_val,
        "world_size": n,
        "rank": 0,
        "local_rank": 0,
        "distributed": n > 1,
    }


def _open(config: RunConfig, facts: dict[str, Any], lock: FolderLock) -> str:
    if storage.is_remote(config.tracking.logs):
        raise ConfigError(f"--logs {config.tracking.logs}: a run's folder is local. Give a local folder.")
    folder, resume, copy = run_folder(config), config.checkpoint.resume, remote_folder(config)
    if config.trains:
        storage.require_writable(folder, "--logs")
        lock.acquire()
    places = [place for place in (folder, copy) if place]
    continues = resume == "latest" or (resume is not None and any(storage.is_inside(resume, one) for one in places))
    if copy and storage.is_inside(copy, folder):
        raise ConfigError(f"--remote-sync: {copy} is the run's own folder, or in it. Give another place to copy to.")
    if copy and continues:
        bring_back_logs(copy, folder)
    if copy and config.trains and not continues and labels_in(storage.join(copy, "checkpoints")):
        raise ConfigError(
            f"--remote-sync: {storage.shown(copy)} already holds a run. Continue it with --resume latest, or choose "
            "another --name."
        )
    if holds_a_run(folder) and config.trains and not continues:
        raise ConfigError(
            f"--name {os.path.basename(folder)}: {folder} already holds a run. Continue it with --resume latest, "
            "or choose another --name."
        )
    storage.require_writable(os.path.join(folder, "checkpoints"), "--logs")
    if config.trains or not holds_a_run(folder):
        lines = (f"{key}: {_one_line(value)}\n" for key, value in {**facts, **config.as_flags()}.items())
        storage.write_text(os.path.join(folder, "params.txt"), "".join(lines))
    if config.tracking.copy_codebase:
        copy_code(folder)
    return folder


def copy_code(folder: str) -> None:
    """Copy this checkout's tracked files, or without git this package's, to `folder/code`; secrets are not tracked."""
    root, target = Path(__file__).resolve().parents[2], os.path.join(folder, "code")
    for name in _tracked_files(root):
        if (root / name).is_file():
            os.makedirs(os.path.dirname(os.path.join(target, name)), exist_ok=True)
            shutil.copyfile(root / name, os.path.join(target, name))


def _tracked_files(root: Path) -> list[str]:
    try:
        listed = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True, check=True)
        return [name for name in listed.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        return [str(path.relative_to(root)) for path in (root / "open_lm").rglob("*.py")]


def run_folder(config: RunConfig) -> str:
    """The folder of the run, whether it exists or not."""
    name = config.tracking.name or default_name(config)
    return os.path.join(str(storage.local_path(config.tracking.logs)), name)


def remote_folder(config: RunConfig) -> str | None:
    """The remote copy of the run's folder (--remote-sync)."""
    url = config.checkpoint.remote_sync
    return storage.join(url, os.path.basename(run_folder(config))) if url else None


def newest_commit(config: RunConfig) -> Commit | None:
    """The newest complete checkpoint of the run, here or where --remote-sync copies it."""
    folders = [folder for folder in (run_folder(config), remote_folder(config)) if folder]
    found = [commit for folder in folders for commit in committed(storage.join(folder, "checkpoints"))]
    return max(found, key=lambda commit: (commit.branch, commit.step), default=None)


def holds_a_run(folder: str) -> bool:
    """Whether anything was computed in `folder`: a start that failed before its first step need not be protected."""
    metrics, checkpoints = os.path.join(folder, "metrics.jsonl"), os.path.join(folder, "checkpoints")
    has_metrics = os.path.exists(metrics) and os.path.getsize(metrics) > 0
    return has_metrics or (os.path.isdir(checkpoints) and bool(os.listdir(checkpoints)))


def _one_line(value: object) -> str:
    """`value` as YAML that fits behind `key: ` on one line."""
    return yaml.safe_dump([value], default_flow_style=True, width=1 << 30).strip()[1:-1]


def default_name(config: RunConfig) -> str:
    """A name made from the time and the settings people compare."""
    model = os.path.splitext(os.path.basename(config.model.model or "of_checkpoint"))[0]
    settings = f"model_{model}-lr_{config.schedule.lr}-b_{config.train.global_batch_size}-p_{config.parallel.precision}"
    return f"{time.strftime('%Y_%m_%d-%H_%M_%S')}-{settings}"
