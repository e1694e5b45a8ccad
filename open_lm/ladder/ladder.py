"""A ladder of models: plans, runs, checkpoints and metrics of all its sizes, as a library."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from open_lm import storage
from open_lm.errors import ConfigError, OpenLMError, Preempted
from open_lm.ladder import records
from open_lm.ladder.config import LadderConfig, read_ladder
from open_lm.ladder.execution import locked, run_command
from open_lm.ladder.plan import SizePlan, plan_size
from open_lm.ladder.records import FoundCheckpoint
from open_lm.ladder.report import describe
from open_lm.ladder.tables import frame_of
from open_lm.ladder.training import as_argv, command_of, require_devices, train_flags, training_config
from open_lm.model.config import ModelConfig

PLAN = "ladder_size.json"
MODEL = "model.json"
BENCHMARKS = "benchmarks"


@dataclass(frozen=True)
class SizeSpeed:
    """Speed of a size, measured over a few steps."""

    size: str
    steps: int
    tokens_per_second: float
    peak_memory_gib: float

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class ModelLadder:
    """Sizes of models trained by one rule; each has a run folder named after it in `work_dir`."""

    def __init__(self, config: LadderConfig):
        self.config = config

    @classmethod
    def from_file(cls, path: str) -> ModelLadder:
        """The ladder of a ladder file."""
        return cls(read_ladder(path))

    @property
    def sizes(self) -> tuple[str, ...]:
        return tuple(self.config.sizes)

    @property
    def work_dir(self) -> str:
        """The local folder that holds the run folders; `dir` itself where that is local.

        Of a remote `dir` it lies beside the ladder file, or in the current folder where that is remote too.
        """
        if storage.is_remote(self.config.root):
            folder = "" if storage.is_remote(self.config.folder) else self.config.folder
            return os.path.join(folder, f"{self.config.name}-work")
        return self.config.root

    def plan(self, size: str) -> SizePlan:
        """All numbers of a size."""
        return plan_size(self.config, size)

    def get_model_config(self, size: str) -> ModelConfig:
        return self.config.size(size).architecture

    def get_num_params(self, size: str) -> int:
        """N of a size, counted as the ladder file says."""
        return self.plan(size).n_params

    def get_num_devices(self, size: str) -> int:
        return self.plan(size).batch.devices

    def get_save_folder(self, size: str) -> str:
        """The folder of a size's checkpoints, local or remote."""
        return storage.join(self.config.root, size)

    def get_checkpoints(self, size: str) -> list[FoundCheckpoint]:
        """The checkpoints that the ladder promises of a size, and which of them exist."""
        return records.find_checkpoints(self.plan(size), self._folders(size))

    def get_metrics(self, size: str | None = None) -> Any:
        """A data frame with one row for each checkpoint that has metrics, of one size or of all."""
        return frame_of(self.metrics_rows([size] if size else self.sizes))

    def metrics_rows(self, sizes: Sequence[str]) -> list[dict[str, Any]]:
        """The content of metrics_step{N}.json of each checkpoint, made from the logs where a kill prevented it."""
        rows = []
        for size in sizes:
            local = self._run_folder(size)
            if os.path.isdir(local):
                records.collect_metrics(self.plan(size), local, self._copies(size))
            found = (records.read_json(c.metrics_path) for c in self.get_checkpoints(size) if c.metrics_path)
            rows += [row for row in found if row is not None]
        return rows

    def dry_run(self, size: str, tokens_per_second: float | None = None) -> str:
        """The report of what `run` would do."""
        plan, flags = self.plan(size), self.train_flags(size)
        config, command = training_config(plan, flags), command_of(plan, as_argv(flags))
        return describe(plan, config, command, tokens_per_second or self._measured_speed(size))

    def train_flags(self, size: str) -> dict[str, Any]:
        """The flags of `open_lm.main` that train a size."""
        plan = self.plan(size)
        return train_flags(plan, os.path.join(self._run_folder(size), MODEL), self.work_dir, size)

    def command(self, size: str) -> list[str]:
        """The command that trains a size; repeated by hand it trains, or resumes, the same run.

        Raises:
            ConfigError: the ladder file's flags of training are wrong, or change what the ladder sets.
        """
        plan, flags = self.plan(size), self.train_flags(size)
        training_config(plan, flags)
        return command_of(plan, as_argv(flags))

    def run(self, size: str) -> None:
        """Train a size, or go on where it was stopped; returns once every promised checkpoint and metric exists.

        Raises:
            ConfigError: the ladder file has changed since the size was started, or another process trains it.
            Preempted: it was told to stop, and has saved.
            OpenLMError: the trainer failed.
        """
        plan, folder = self.plan(size), self._run_folder(size)
        with locked(folder) as lock:
            self._keep_facts(plan, folder)
            self._collect(plan, folder)
            if self.is_complete(size):
                print(f"{size}: complete", flush=True)
                return
            command = self.command(size)
            require_devices(plan, command)
            print(f"{size}: $ {shlex.join(command)}", flush=True)
            code = run_command(command, lock, lambda: records.collect_metrics(plan, folder))
            self._collect(plan, folder)
        if code == Preempted.exit_code:
            raise Preempted(f"{size} was stopped and has saved. Run the ladder again to go on.")
        if code:
            raise OpenLMError(f"the trainer ended with exit code {code}; see {folder}/out.log.")
        if not self.is_complete(size):
            raise OpenLMError(f"{', '.join(self._missing(size))} missing after the run; see {folder}/out.log.")

    def run_benchmark(self, size: str, steps: int = 20) -> SizeSpeed:
        """Speed and memory of a size over `steps` steps, measured apart from its run and kept for dry runs.

        Raises:
            OpenLMError: the trainer failed.
        """
        plan, folder = self.plan(size), os.path.join(self.work_dir, BENCHMARKS)
        name = f"{size}-benchmark"
        run_folder = os.path.join(folder, name)
        with locked(folder) as lock:
            shutil.rmtree(run_folder, ignore_errors=True)
            self._write_model(plan, run_folder)
            without = dict.fromkeys(
                ("val_data", "icl_tasks", "icl_frequency", "eval_at_steps", "save_at_steps", "resume", "remote_sync",
                 "ephemeral_every_steps")
            )  # fmt: skip
            flags = train_flags(plan, os.path.join(run_folder, MODEL), folder, name, **without)
            flags |= {"stop_at_step": min(steps, plan.steps), "log_every_n_steps": max(1, min(steps, plan.steps) // 10)}
            command = command_of(plan, as_argv(flags))
            require_devices(plan, command)
            print(f"{size}: $ {shlex.join(command)}", flush=True)
            if code := run_command(command, lock, lambda: None):
                raise OpenLMError(f"the trainer ended with exit code {code}; see {run_folder}/out.log.")
            found = self._speed_of(size, run_folder)
            storage.write_text(os.path.join(folder, f"{size}.json"), json.dumps(found.to_dict(), indent=1))
            shutil.rmtree(run_folder, ignore_errors=True)
        return found

    def is_complete(self, size: str) -> bool:
        """Whether every promised checkpoint of a size exists where it is kept, and its metrics."""
        return not self._missing(size)

    def _missing(self, size: str) -> list[str]:
        found = records.find_checkpoints(self.plan(size), [self.get_save_folder(size)])
        return [f"checkpoint of step {c.info.step}" for c in found if c.path is None] + [
            records.metrics_name(c.info.step) for c in found if c.metrics_path is None
        ]

    def _run_folder(self, size: str) -> str:
        return os.path.join(self.work_dir, size)

    def _collect(self, plan: SizePlan, folder: str) -> None:
        records.collect_metrics(plan, folder, self._copies(plan.name))
        for remote in self._copies(plan.name):
            records.copy_metrics(folder, remote)

    def _copies(self, size: str) -> list[str]:
        return [self.get_save_folder(size)] if storage.is_remote(self.config.root) else []

    def _folders(self, size: str) -> list[str]:
        return [self._run_folder(size), *self._copies(size)]

    def _keep_facts(self, plan: SizePlan, folder: str) -> None:
        """Write the plan of a size that starts; refuse one that differs from the plan it was started with."""
        if self._kept_facts(plan.name) is None:
            facts = json.loads(json.dumps(plan.facts()))
            self._write_model(plan, folder)
            for place in self._folders(plan.name):
                storage.write_text(storage.join(place, PLAN), json.dumps(facts, indent=1))
            return
        if differences := self.changes(plan.name):
            raise ConfigError(
                f"the size was started with another ladder file: {'; '.join(differences)}. Put that back, "
                f"or give the ladder another dir, or remove {folder}."
            )
        self._write_model(plan, folder)

    def changes(self, size: str) -> list[str]:
        """Differences between the ladder file and the one that a size was started with, in words."""
        kept = self._kept_facts(size)
        return differing(kept, json.loads(json.dumps(self.plan(size).facts()))) if kept else []

    def _kept_facts(self, size: str) -> dict[str, Any] | None:
        """The plan that a size was started with; None before it was."""
        return next((k for k in (records.read_json(storage.join(f, PLAN)) for f in self._folders(size)) if k), None)

    def _write_model(self, plan: SizePlan, folder: str) -> None:
        path = os.path.join(folder, MODEL)
        content = json.dumps(plan.size.architecture.to_dict(), indent=1)
        if not os.path.exists(path) or storage.read_text(path) != content:
            storage.write_text(path, content)

    def _measured_speed(self, size: str) -> float | None:
        """Tokens per second of the benchmark of a size, or else of its run so far."""
        kept = records.read_json(os.path.join(self.work_dir, BENCHMARKS, f"{size}.json"))
        return kept["tokens_per_second"] if kept else self.speed_so_far(size)

    def speed_so_far(self, size: str) -> float | None:
        """Median tokens per second of the reports of a size's run."""
        rows = records.metrics_by_step(self._run_folder(size)).values()
        speeds = [row["train/tokens_per_second"] for row in rows if row.get("train/tokens_per_second")]
        return statistics.median(speeds[-50:]) if speeds else None

    def steps_done(self, size: str) -> int:
        """The last step that a size's run has logged."""
        return max(records.metrics_by_step(self._run_folder(size)), default=0)

    def _speed_of(self, size: str, folder: str) -> SizeSpeed:
        rows = records.metrics_by_step(folder)
        later = [row for step, row in sorted(rows.items()) if "train/tokens_per_second" in row]
        later = later[len(later) // 3 :]  # the first steps warm up
        if not later:
            raise OpenLMError(f"the benchmark logged no speed; see {folder}/out.log.")
        speed = statistics.median(row["train/tokens_per_second"] for row in later)
        return SizeSpeed(size, max(rows), speed, max(row.get("train/peak_memory_gib", 0.0) for row in later))


def differing(kept: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Differences between two plans of a size, in words; keys that one of them lacks are left out.

    Keys of the architecture that were added since take their defaults.
    """
    model = ModelConfig.from_dict(kept["model"], "ladder_size.json").to_dict()
    before = {f"model.{key}": value for key, value in json.loads(json.dumps(model)).items()} | kept
    after = {f"model.{key}": value for key, value in now["model"].items()} | now
    shared = sorted((set(before) & set(after)) - {"model"})
    return [f"{key} was {before[key]!r}, is now {after[key]!r}" for key in shared if before[key] != after[key]]


def run_all(ladder: ModelLadder, sizes: Sequence[str], work: Any) -> None:
    """Call `work(size)` for each of `sizes`; one that fails does not keep the others from running.

    Raises:
        ConfigError: the ladder file does not fit a size; found before anything runs.
        OpenLMError: some failed; the message names each.
    """
    for size in sizes:
        ladder.command(size)
    failures: dict[str, OpenLMError] = {}
    for size in sizes:
        try:
            work(size)
        except Preempted:
            raise
        except OpenLMError as error:
            print(f"{size} failed{', the others go on' if len(sizes) > 1 else ''}: {error}", flush=True)
            failures[size] = error
    if len(failures) == 1 and len(sizes) == 1:
        raise next(iter(failures.values()))
    if failures:
        reasons = "\n".join(f"  {size}: {error}" for size, error in failures.items())
        raise OpenLMError(f"{len(failures)} of {len(sizes)} sizes failed:\n{reasons}")
