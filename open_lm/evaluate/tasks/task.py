"""Settings of one task, as LLM Foundry's YAML spells them, checked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from open_lm.errors import ConfigError

LM_ACCURACY = "InContextLearningLMAccuracy"
MC_ACCURACY = "InContextLearningMultipleChoiceAccuracy"
EXACT_MATCH = "InContextLearningGenerationExactMatchAccuracy"
LM_CALIBRATION = "InContextLearningLMExpectedCalibrationError"
MC_CALIBRATION = "InContextLearningMCExpectedCalibrationError"

METRICS_OF = {
    "multiple_choice": (MC_ACCURACY, MC_CALIBRATION),
    "language_modeling": (LM_ACCURACY, LM_CALIBRATION),
    "schema": (MC_ACCURACY, MC_CALIBRATION),
    "generation_task_with_answers": (EXACT_MATCH,),
}
"""What can be measured on each type of task; the first is measured when a task does not say."""

OLD_TYPES = {"question_answering": "generation_task_with_answers"}
OLD_KEYS = {"question_prelimiter": "prelimiter"}
KEYS_READ_ELSEWHERE = ("random_baseline",)


@dataclass(frozen=True)
class EvalTask:
    """One entry of `icl_tasks`: a file of questions and how they are asked. Defaults are LLM Foundry's."""

    label: str
    dataset_uri: str
    icl_task_type: str
    num_fewshot: tuple[int, ...]
    metric_names: tuple[str, ...] = ()
    prompt_string: str = ""
    example_delimiter: str = "\n"
    continuation_delimiter: str = " "
    prelimiter: str = ""
    context_key: str = ""
    answer_key: str = ""
    choices_key: str = ""
    has_categories: bool = False
    strip_dataset: bool = True
    fewshot_random_seed: int = 1234
    max_seq_len: int | None = None
    batch_size: int | None = None
    cot_delimiter: str = ""
    early_stopping_criteria: tuple[str, ...] = ()
    do_normalization: bool = True
    generation_kwargs: Mapping[str, Any] = field(default_factory=dict)
    random_baseline: float | None = None
    data_path: str = ""

    @property
    def chance(self) -> float | None:
        """The accuracy of blind guessing, where the task says so."""
        return self.random_baseline


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
    return _checked(EvalTask(**{**_keys_of(values["icl_task_type"], origin), **values}), origin)


def _keys_of(task_type: str, origin: str) -> dict[str, str]:
    """Under which keys a file of this type keeps its questions, unless the task says otherwise."""
    match task_type:
        case "multiple_choice":
            return {"context_key": "query", "answer_key": "answer", "choices_key": "choices"}
        case "language_modeling":
            return {"context_key": "context", "answer_key": "continuation"}
        case "schema":
            return {"context_key": "context_options", "answer_key": "continuation", "choices_key": "context_options"}
        case "generation_task_with_answers":
            return {"context_key": "context", "answer_key": "answer"}
    raise ConfigError(f"{origin}: icl_task_type {task_type!r} is unknown. Choose one of {', '.join(METRICS_OF)}.")


def _checked(task: EvalTask, origin: str) -> EvalTask:
    possible = METRICS_OF[task.icl_task_type]
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
