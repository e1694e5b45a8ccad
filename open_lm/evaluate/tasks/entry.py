"""One entry of a YAML's `icl_tasks`, read and checked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from open_lm.errors import ConfigError
from open_lm.evaluate.tasks.kinds import KINDS, type_of
from open_lm.evaluate.tasks.task import EvalTask

OLD_TYPES = {"question_answering": "generation_task_with_answers"}
OLD_KEYS = {"question_prelimiter": "prelimiter"}


def read_task(entry: Any, origin: str) -> EvalTask:
    """The task that one mapping of a YAML file describes; `origin` says where it stands, for messages.

    Raises:
        ConfigError: a key is missing, unknown or of the wrong kind, or the task type is unknown.
    """
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{origin}: found {entry!r}, need a mapping with label, dataset_uri, icl_task_type …")
    values = {OLD_KEYS.get(str(key), str(key)): value for key, value in entry.items()}
    origin = f"{origin} ({values.get('label', 'without label')})"
    known = {f.name: f for f in fields(EvalTask) if f.name != "data_path"}
    if "pass_at_k" in values:
        raise ConfigError(f"{origin}: pass_at_k needs the written programs to be run, which is not done here.")
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"Known keys: {', '.join(known)}."
            raise ConfigError(f"{origin}: unknown key {key!r}. {hint}")
    for key in ("label", "dataset_uri", "icl_task_type", "num_fewshot"):
        if values.get(key) in (None, ""):
            raise ConfigError(f"{origin}: no {key}. Every task needs label, dataset_uri, icl_task_type, num_fewshot.")
    kinds = {name: _kind(f.type) for name, f in known.items()}
    values = {key: _converted(value, kinds[key], f"{origin}: {key}") for key, value in values.items()}
    values["icl_task_type"] = OLD_TYPES.get(values["icl_task_type"], values["icl_task_type"])
    name = values["icl_task_type"]
    if name not in KINDS:
        raise ConfigError(f"{origin}: icl_task_type {name!r} is unknown. Choose one of {', '.join(KINDS)}.")
    return _checked(EvalTask(**{**KINDS[name].keys, **values}), origin)


def _checked(task: EvalTask, origin: str) -> EvalTask:
    possible = type_of(task).metrics
    names = task.metric_names or possible[:1]
    for name in names:
        if name not in possible:
            kind = task.icl_task_type
            raise ConfigError(f"{origin}: metric {name!r} is not defined for {kind}. Choose of {', '.join(possible)}.")
    for n_shots in task.num_fewshot:
        if n_shots < 0:
            raise ConfigError(f"{origin}: num_fewshot {n_shots} is below 0.")
    return EvalTask(**{**vars(task), "metric_names": tuple(names)})


def _kind(annotation: Any) -> str:
    return str(annotation).removesuffix(" | None")


def _converted(value: Any, kind: str, origin: str) -> Any:
    """`value` as `kind` needs it; a single item where several may stand is a list of one."""
    match kind:
        case "str" if isinstance(value, str):
            return value
        case "bool" if isinstance(value, bool):
            return value
        case "int" if isinstance(value, int) and not isinstance(value, bool):
            return value
        case "float" if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        case "tuple[int, ...]" | "tuple[str, ...]":
            item = kind[6:9]
            return tuple(_converted(each, item, origin) for each in (value if isinstance(value, list) else [value]))
        case "Mapping[str, Any]" if isinstance(value, Mapping):
            return dict(value)
    if value is None and kind in ("str", "tuple[str, ...]", "Mapping[str, Any]"):
        return {"str": "", "tuple[str, ...]": (), "Mapping[str, Any]": {}}[kind]
    raise ConfigError(f"{origin}: found {value!r}, need {kind}.")
