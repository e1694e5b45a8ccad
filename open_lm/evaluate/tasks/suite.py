"""Task suites: an LLM Foundry YAML (or OpenLM's old one), read and checked."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.errors import ConfigError
from open_lm.evaluate.tasks.entry import read_task
from open_lm.evaluate.tasks.interpolation import resolved
from open_lm.evaluate.tasks.task import EvalTask

REPOSITORY = Path(__file__).resolve().parents[3]
SUITES = Path(__file__).resolve().parents[1] / "suites"
PRECISIONS = {"fp32": "fp32", "amp_bf16": "amp_bf16", "amp_bfloat16": "amp_bf16", "amp_fp16": "fp16", "bf16": "bf16"}
READ = ("icl_tasks", "eval_gauntlet", "max_seq_len", "device_eval_batch_size", "precision", "seed")
UNSUPPORTED = ("code_evaluation",)
"""LLM Foundry's types that are skipped by name: they run what the model has written."""

FOUNDRY_DATA = ("eval/local_data/", "local_data/")
READ_AS_WELL = ("icl_subset_num_batches",)
INSTEAD = {
    "fsdp_config": "every rank holds the whole model and asks its share of the questions; --fsdp shards it",
    "parallelism_config": "every rank holds the whole model and asks its share of the questions; --fsdp shards it",
    "loggers": "results are written to results.json, results.csv and results.md",
}
"""Keys that ask for what is done otherwise here."""
NOT_NEEDED_HERE = (
    "models", "model", "tokenizer", "run_name", "load_path", "dist_timeout", "variables", "python_log_level",
    "log_config", "model_name_or_path", "model_config", "max_duration", "callbacks",
    "console_log_interval", "progress_bar", "metadata", "global_train_batch_size", "eval_subset_num_batches",
)  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """The tasks of an evaluation and how they are run. `gauntlet` is the YAML's eval_gauntlet, as it stands there."""

    tasks: tuple[EvalTask, ...]
    gauntlet: Mapping[str, Any] | None = None
    max_seq_len: int | None = None
    batch_size: int = 8
    precision: str = "fp32"
    seed: int = 17
    subset_batches: int | None = None
    path: str = ""
    origin: str = ""


def read_suite(path: str, *, only: Iterable[str] = (), flag: str = "--eval-yaml") -> Suite:
    """The suite in the YAML file at `path`, which `flag` named; with `only`, just the tasks of those labels.

    Raises:
        ConfigError: the file or one it includes is missing or malformed, a task is, or a task's data is not there.
    """
    origin = f"{flag} {path}"
    path = suite_path(path)
    values = _read_yaml(path, flag)
    for key in sorted(set(values) - {*READ, *READ_AS_WELL, *NOT_NEEDED_HERE, *INSTEAD}):
        logging.warning("%s: key %r is not known and has no effect.", origin, key)
    for key in (key for key in INSTEAD if values.get(key)):
        logging.warning("%s: %s has no effect here: %s.", origin, key, INSTEAD[key])
    entries = values.get("icl_tasks")
    if isinstance(entries, str):
        included = _beside(entries, path)
        entries, path_of_tasks = _read_yaml(included, f"{origin}: icl_tasks").get("icl_tasks"), included
    else:
        path_of_tasks = path
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{flag} {path_of_tasks}: icl_tasks: found {entries!r:.60}, need a list of tasks.")
    left_out = [entry for entry in entries if _is_unsupported(entry)]
    if left_out:
        listed = ", ".join(f"{entry.get('label')} ({entry['icl_task_type']})" for entry in left_out)
        logging.warning("%s: %d tasks skipped, of types that are not run here: %s.", origin, len(left_out), listed)
    numbered = [(i, entry) for i, entry in enumerate(entries) if entry not in left_out]
    tasks = [read_task(entry, f"{path_of_tasks}: icl_tasks[{i}]") for i, entry in numbered]
    _require_own_names(tasks, path_of_tasks)
    tasks = _chosen(tasks, tuple(only), path)
    gauntlet = _gauntlet(values.get("eval_gauntlet"), path, origin)
    return Suite(
        tasks=tuple(replace(task, data_path=data_path(task.dataset_uri, path_of_tasks)) for task in tasks),
        gauntlet=gauntlet,
        max_seq_len=_number(values, "max_seq_len", origin),
        batch_size=_number(values, "device_eval_batch_size", origin) or 8,
        precision=_precision(values.get("precision", "fp32"), origin),
        seed=values.get("seed", 17),
        subset_batches=_number(values, "icl_subset_num_batches", origin),
        path=path,
        origin=origin,
    )


def _is_unsupported(entry: Any) -> bool:
    return isinstance(entry, Mapping) and entry.get("icl_task_type") in UNSUPPORTED


def _require_own_names(tasks: list[EvalTask], path: str) -> None:
    """Refuse two tasks whose results would go by one name.

    Raises:
        ConfigError: two have one label and one number of examples.
    """
    names: set[tuple[str, int]] = set()
    for task in tasks:
        for n_shots in task.num_fewshot:
            if (task.label, n_shots) in names:
                raise ConfigError(f"{path}: two tasks are called {task.label} at {n_shots}-shot: rename one of them.")
            names.add((task.label, n_shots))


def require_data(suite: Suite) -> None:
    """Check that every task's file is there, before a model is loaded.

    Raises:
        ConfigError: one is missing; the message names all of them.
    """
    missing = {task.label: task.dataset_uri for task in suite.tasks if not storage.exists(task.data_path)}
    if missing:
        listed = ", ".join(f"{label} ({uri})" for label, uri in missing.items())
        fetch = f"Run `openlm download tasks --eval-yaml {suite.path}`, or correct dataset_uri."
        advice = fetch if any(map(foundry_name, missing.values())) else "Correct dataset_uri, or put the files there."
        raise ConfigError(f"{suite.origin}: no data for {listed}. {advice}")


def foundry_name(uri: str) -> str | None:
    """The name of a task's file in LLM Foundry's local_data, which can be downloaded; None for any other file."""
    return next((uri.removeprefix(prefix) for prefix in FOUNDRY_DATA if uri.startswith(prefix)), None)


def suite_path(name: str) -> str:
    """The YAML of a suite: a path, from the working folder or the repository, or the name of one in the package."""
    if os.path.exists(found := data_path(name, name)):
        return found
    ours = SUITES / f"{Path(name).name.removesuffix('.yaml')}.yaml"
    return str(ours) if Path(name).parent.name in ("", "yamls") and ours.exists() else name


def data_path(uri: str, yaml_path: str) -> str:
    """The path of a task's file: as written, from the working folder, the YAML's folder, the repository or the suites
    of the package, so that a copy of one of these YAMLs finds its samples."""
    if storage.is_remote(uri) or os.path.isabs(os.path.expanduser(uri)):
        return uri
    here = Path.cwd()
    for folder in (here, Path(yaml_path).resolve().parent, REPOSITORY, here / "eval", REPOSITORY / "eval", SUITES):
        if (folder / uri).exists():
            return str(folder / uri)
    return uri


def _read_yaml(path: str, origin: str) -> dict[str, Any]:
    import yaml

    if not os.path.exists(path):
        ours = [path.stem for path in sorted(SUITES.glob("*.yaml"))]
        near = difflib.get_close_matches(path, ours, n=1) or [", ".join(ours)]
        raise ConfigError(f"{origin} {path}: no such file. Give a YAML with icl_tasks, or a suite: {near[0]}.")
    try:
        loaded = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{origin} {path}: {error}. Give a readable YAML file with icl_tasks.") from error
    if not isinstance(loaded, Mapping):
        raise ConfigError(f"{origin} {path}: holds a {type(loaded).__name__}, need keys such as icl_tasks.")
    return resolved(loaded, f"{origin} {path}")


def _beside(name: str, path: str) -> str:
    """A file that a YAML names: from the working folder, its own folder, or the repository."""
    return data_path(name, path)


def _chosen(tasks: list[EvalTask], only: tuple[str, ...], path: str) -> list[EvalTask]:
    labels = {task.label for task in tasks}
    if unknown := [label for label in only if label not in labels]:
        raise ConfigError(f"--tasks {unknown[0]}: not in {path}. It has {', '.join(sorted(labels))}.")
    return [task for task in tasks if not only or task.label in only]


def _gauntlet(value: Any, path: str, origin: str) -> Mapping[str, Any] | None:
    if isinstance(value, str):
        included = _beside(value, path)
        value = _read_yaml(included, f"{origin}: eval_gauntlet").get("eval_gauntlet")
    if value is not None and not (isinstance(value, Mapping) and isinstance(value.get("categories"), list)):
        raise ConfigError(f"{origin}: eval_gauntlet: need a mapping with a list of categories.")
    return value


def _number(values: Mapping[str, Any], key: str, origin: str) -> int | None:
    value = values.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ConfigError(f"{origin}: {key}: found {value!r}, need a whole number above 0.")
    return value


def _precision(name: Any, origin: str) -> str:
    if name not in PRECISIONS:
        raise ConfigError(f"{origin}: precision: found {name!r}, choose one of {', '.join(PRECISIONS)}.")
    return PRECISIONS[name]
